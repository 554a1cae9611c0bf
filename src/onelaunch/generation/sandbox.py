"""The Jinja environment of chat templates: that of transformers, with bounds.

A template comes with a model, from a stranger. Jinja's sandbox keeps it from Python's internals and
from changing what it is passed; the bounds here end templates that loop, or build large strings.
"""

from __future__ import annotations

import functools
import json
import re
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

# A conversation that fills a context of 128k tokens has about half a million characters.
MAX_OUTPUT = 4 << 20  # characters
MAX_CHARACTERS = 16 << 20  # of all texts and lists that are made on the way
MAX_STEPS = 1_000_000  # iterations, calls and filters: seconds
MAX_SECONDS = 5.0
_MAX_PRODUCT = 64 << 20  # of the size of a value and of an argument: a bound on what comes of both
_MAX_POWER_BITS = 4096
_MAX_INDENT = 16
_PASSED = (jinja2.Environment, nodes.EvalContext, Context)  # to filters that want them
_WIDTH = re.compile(r"\d{6}|\*")  # in a format


class Refusal(TemplateError):
    """A template's own refusal of the messages, by `raise_exception`."""


class TooMuch(TemplateError):
    """A template went beyond a bound."""


class _Budget:
    """What one rendering may still use."""

    def __init__(self) -> None:
        self.steps, self.characters = MAX_STEPS, MAX_CHARACTERS
        self.end = time.monotonic() + MAX_SECONDS


_budget: ContextVar[_Budget | None] = ContextVar("onelaunch_template_budget", default=None)


def render_bounded(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
    """Render a template of `compile_template`. Raises Refusal, TooMuch, or whatever error the
    template runs into."""
    token = _budget.set(_Budget())
    try:
        pieces, size = [], 0
        for piece in template.generate(variables):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_OUTPUT:
                raise TooMuch(f"it writes more than {MAX_OUTPUT} characters")
        return "".join(pieces)
    finally:
        _budget.reset(token)


def compile_template(source: str) -> jinja2.Template:
    """Compile a chat template. Raises jinja2.TemplateSyntaxError, and RecursionError for one that
    is nested too deep."""
    environment = _Environment()
    tree = _Bounding().visit(environment.parse(source))
    return environment.template_class.from_code(
        environment, environment.compile(tree), environment.make_globals(None)
    )


class _Environment(ImmutableSandboxedEnvironment):
    """transformers' environment; each call, filter and operator that can enlarge a value counts."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
            finalize=_finalize,
        )
        self.filters["tojson"] = _tojson
        for name, function in self.filters.items():
            self.filters[name] = _bounded_filter(name, function)
        self.filters["_iterate"] = _iterate
        self.filters["_concatenate"] = _concatenate
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": lambda format: datetime.now().strftime(format),
            "dict": lambda *args, **kwargs: dict(*args, **kwargs),
            "namespace": _Namespace,
        }
        del self.globals["lipsum"]  # text of any length

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        # `str.format` comes wrapped
        function = getattr(__obj, "__wrapped__", __obj)
        owner = function.__self__ if isinstance(function, types.BuiltinMethodType) else None
        if isinstance(owner, str | bytes):
            if function.__name__ == "translate":
                raise SecurityError("str.translate is not available")
            _check_sizes(function.__name__, owner, (*args, *kwargs.values()))
        _step()
        return _charged(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * right > _MAX_POWER_BITS:
                raise TooMuch(f"a power has more than {_MAX_POWER_BITS} bits")
        elif operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(other, int) and isinstance(one, str | bytes | list | tuple):
                    _check_product(len(one), other)
        elif operator == "%" and isinstance(left, str | bytes):
            _check_sizes("format", left, right if isinstance(right, tuple) else (right,))
        return _charged(super().call_binop(context, operator, left, right))


class _Bounding(NodeTransformer):
    """Makes the loops, the literal text and the concatenations of a template count."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "_iterate", node.lineno)
        return node

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Const:
        return nodes.Const(node.data, lineno=node.lineno)  # is passed to `finalize`

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "_concatenate", node.lineno)


def _filtered(node: nodes.Node, name: str, line: int) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=line)  # type: ignore[arg-type]


class _Generation(Extension):
    """`{% generation %}`, which marks what an assistant wrote for training: its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Namespace(Namespace):
    """A namespace without attributes that Python itself looks up."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, values = args[0], dict(*args[1:], **kwargs)
        Namespace.__init__(self)
        for name, value in values.items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace has no attribute {name!r}")
        super().__setitem__(name, value)


def _raise_exception(message: Any) -> None:
    raise Refusal(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if (len(indent) if isinstance(indent, str) else indent or 0) > _MAX_INDENT:
        raise TooMuch(f"tojson indents by at most {_MAX_INDENT}")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)  # with what says whether it takes the context first
    def bounded(*args: Any, **kwargs: Any) -> Any:
        _step()
        values = [arg for arg in args if not isinstance(arg, _PASSED)]
        if name not in ("default", "d") and values:
            _check_sizes(name, values[0], (*values[1:], *kwargs.values()))
        return _charged(function(*args, **kwargs))

    return bounded


@jinja2.pass_context
def _finalize(context: Context, value: Any) -> Any:
    """Count what is written, also into a variable."""
    text = value if isinstance(value, str) else str(value)
    return _charged(text)


def _iterate(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _step()
        yield value


def _concatenate(values: list[Any]) -> str:
    texts = [str(value) for value in values]
    _charge(sum(map(len, texts)))
    return "".join(texts)


def _step() -> None:
    budget = _budget.get()
    if budget is None:  # the compiler folds constants
        return
    budget.steps -= 1
    if budget.steps < 0 or (budget.steps % 64 == 0 and time.monotonic() > budget.end):
        raise TooMuch("it loops for too long")


def _charged(value: Any) -> Any:
    if isinstance(value, str | bytes | list | tuple):
        _charge(len(value))
    return value


def _charge(size: int) -> None:
    budget = _budget.get()
    if budget is not None:
        budget.characters -= size
        if budget.characters < 0:
            raise TooMuch(f"it makes more than {MAX_CHARACTERS} characters")


def _check_sizes(name: str, value: Any, args: Iterable[Any]) -> None:
    """Refuse a call whose result may be large: a width, or a long replacement in a long text."""
    if name in ("format", "format_map") and isinstance(value, str | bytes):
        text = value if isinstance(value, str) else value.decode("latin-1")
        if _WIDTH.search(text):
            raise TooMuch("a format has a width of six digits or more, or *")
    for arg in args:
        if isinstance(arg, int):
            _check_product(_size(value), arg)
        elif isinstance(arg, str | bytes):
            _check_product(_size(value), len(arg))


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes | list | tuple | dict) else 1


def _check_product(size: int, times: int) -> None:
    if max(1, size) * times > _MAX_PRODUCT:
        raise TooMuch("it makes a text or list that is too long")
