"""Chat templates: equal to transformers' rendering, bounded, and encoded with their tokens."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from onelaunch.checkpoints.tokenizers import BytesTokenizer, JsonTokenizer
from onelaunch.errors import BadInput, MissingExtra
from onelaunch.generation.chat import CHATML, ChatTemplate, chat_template
from onelaunch.generation.conversation import Conversation, chat_format, end_of_turn
from onelaunch.generation.prompts import prompt_ids
from tests.generation.chat_templates import (
    GEMMA,
    LLAMA_3,
    MISTRAL,
    PARTS,
    PARTS_ONLY,
    QWEN_2,
    QWEN_3,
    TEMPLATES,
    ZEPHYR,
)
from tests.tokenizer_files import (
    byte_names,
    byte_names_by_value,
    json_tokenizer,
    llama2c_tokenizer,
    small_model,
    token,
    write_json_tokenizer,
)

jinja2 = pytest.importorskip("jinja2")

USER = {"role": "user", "content": "Why is the sky blue?"}
TURNS = [
    {"role": "system", "content": "Be brief."},
    USER,
    {"role": "assistant", "content": " Rayleigh\nscattering. "},
    {"role": "user", "content": "<b>\u00e9t\u00e9 \U0001f600 & 'so'</b>\n"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather <here> & \u00e9",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CALLS = [
    *TURNS,
    {
        "role": "assistant",
        "content": "<think>\nhm\n</think>\n\nOne moment.",
        "tool_calls": [
            {"function": {"name": "weather", "arguments": {"city": "K\u00f6ln"}}},
            {"function": {"name": "weather", "arguments": '{"city": "Bonn"}'}},
        ],
        "refusal": None,
    },
    {"role": "tool", "content": "rain"},
    {"role": "tool", "content": "sun"},
]


def theirs(source: str, messages, **options) -> str:
    """transformers' rendering, of a tokenizer that has nothing but the special tokens."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    empty = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=empty, bos_token="<s>", eos_token="</s>", chat_template=source
    )
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def ours(source: str, messages, **options) -> str:
    return ChatTemplate(source, "<s>", "</s>").render(messages, **options)


@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_as_transformers_does(name):
    source = TEMPLATES[name]
    starts = {"mistral": 1, "gemma": 1}.get(name, 0)  # without a system message
    for messages in ([USER], TURNS[starts:], TURNS[starts:-1]):
        for prompt in (True, False):
            expected = theirs(source, messages, add_generation_prompt=prompt)
            assert ours(source, messages, add_generation_prompt=prompt) == expected
            assert "sky" in expected


def test_renders_tools_calls_and_variables_as_transformers_does():
    options = {"tools": TOOLS, "add_generation_prompt": True}
    for variables in ({}, {"enable_thinking": False}, {"enable_thinking": True}):
        expected = theirs(QWEN_3, CALLS, **options, **variables)
        assert ours(QWEN_3, CALLS, **options, **variables) == expected
        assert "The weather <here> & \u00e9" in expected
        assert '{"city": "K\u00f6ln"}' in expected


CONSTRUCTS = {
    "loop": "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}"
    "{{ loop.previtem is defined }}{{ loop.revindex0 }}{% endfor %}",
    "controls": "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}"
    "{% if i == 5 %}{% break %}{% endif %}{{ i }}{% else %}none{% endfor %}",
    "filtered": "{% for m in messages if m.role == 'user' %}{{ m.content | length }} {% endfor %}",
    "recursive": "{% for x in [[1, [2]], [3]] recursive %}{% if x is iterable %}({{ loop(x) }})"
    "{% else %}{{ x }}{% endif %}{% endfor %}",
    "macro": "{% macro show(m, sep=': ') %}{{ m.role ~ sep ~ m['content'] }}{% endmacro %}"
    "{% for m in messages %}{{ show(m) }}{{ show(m, sep=1) }}{% endfor %}",
    "json": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}"
    "{{ {'b': 1, 'a': '<&>'} | tojson(sort_keys=true, separators=(',', ':')) }}",
    "generation": "{% for m in messages %}{% generation %}{% set x = m.role %}{{ x }}"
    "{% endgeneration %}{{ x }}{% endfor %}",
    "filters": "{{ messages | map(attribute='role') | unique | join(', ') }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
    "{{ 'a-b' | replace('-', '+') | upper }}{{ '%s=%5.1f' | format('x', 2) }}"
    "{{ nothing | default(7) }}{{ 'x' | center(9) }}|{{ 'a b' | title }}"
    "{{ {'z': 1} | items | list }}{{ 3.14159 | round(2) }}",
    "strings": "{{ 'a b'.split(' ') }}{{ '{}-{:>4}'.format(1, 'x') }}{{ 'ab' * 3 }}{{ '%d' % 5 }}"
    "{{ ' x '.strip() + 'y' }}{{ 2 ** 10 }}{{ 7 % 4 }}{{ [1] + [2] }}{{ 1 + 1.5 }}{{ -3 // 2 }}",
    "set": "{% set text %}<{{ messages[0].content }}>{% endset %}{{ text }}{{ text | length }}",
    "namespace": "{% set ns = namespace(n=0, s='') %}{% for m in messages %}"
    "{% set ns.n = ns.n + 1 %}{% set ns.s = ns.s ~ m.role[0] %}{% endfor %}"
    "{{ ns.n }}{{ ns.s }}{{ dict(a=1) }}",
    "undefined": "[{{ nothing }}][{{ messages[0].nothing }}][{{ messages[99] }}]{{ tools }}"
    "{{ documents }}{{ nothing is defined }}{{ none }}{{ true }}",
    "white space": "a\n  {% if true %}\n  b\n  {%- endif %}\n{# c #}\nd  {{- 1 -}}  e\n",
    "year": "{{ strftime_now('%Y') | length }}",
}


@pytest.mark.parametrize("construct", CONSTRUCTS)
def test_each_construct_renders_as_transformers_renders_it(construct):
    source = CONSTRUCTS[construct]
    assert ours(source, TURNS) == theirs(source, TURNS, add_generation_prompt=True)


def test_a_template_sees_no_value_that_is_none_and_changes_no_message():
    messages = [{"role": "user", "content": "a", "tool_calls": None}]
    assert ours("{{ messages[0].tool_calls is defined }}", messages) == "False"
    for change in ("messages.append(1)", "messages[0].update(role='x')", "messages.clear()"):
        with pytest.raises(BadInput, match="fails on these messages"):
            ours("{{ " + change + " }}", messages)
    assert messages == [{"role": "user", "content": "a", "tool_calls": None}]


def test_a_refusal_and_a_failure_are_bad_input_in_one_line():
    with pytest.raises(BadInput, match="the chat template refuses these messages: System role not"):
        ours(GEMMA, TURNS)
    with pytest.raises(BadInput, match="roles must alternate"):
        ours(MISTRAL, [USER, USER])
    long = "{{ raise_exception('line\n' * 999) }}"
    with pytest.raises(BadInput) as caught:
        ours(long, [USER])
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)
    for source in ("{{ 1 / 0 }}", "{{ nothing.more }}", "{{ nothing() }}", "{% include 'x' %}"):
        with pytest.raises(BadInput, match="the chat template fails on these messages"):
            ours(source, [USER])


@pytest.mark.parametrize(
    "source",
    ["{% for %}", "{{", "{% if true %}", "{{ x | nofilter }}", "{% nothing %}", "{{ 'a }}",
     "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "{% if x %}" * 200 + "{% endif %}" * 200],
    ids=range(8),
)  # fmt: skip
def test_what_does_not_compile_is_bad_input(source):
    with pytest.raises(BadInput, match="the chat template does not compile") as caught:
        ChatTemplate(source)
    assert "\n" not in str(caught.value)


def test_a_source_that_is_too_long_is_refused():
    limit = 1 << 18
    assert ours("x" * limit, [USER]) == "x" * limit
    with pytest.raises(BadInput, match=f"more than {limit} characters"):
        ChatTemplate("x" * (limit + 1))


def test_messages_of_another_form_are_refused():
    for messages, match in (
        ([], "one message or more"),
        ("hello", "must be a list"),
        ({"role": "user"}, "must be a list"),
        (["hello"], r"messages\[0\]: must have a role"),
        ([USER, {"content": "x"}], r"messages\[1\]: must have a role"),
        ([{"role": 1, "content": "x"}], "must have a role"),
        ([{"role": "user", "content": 3}], "must be a text or a list of parts"),
        ([{"role": "user", "content": ["x"]}], "without a type"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "'image_url': only text"),
        ([{"role": "user", "content": [{"type": "text"}]}], "only text"),
        ([{"role": "user", "content": "x", "extra": object()}], "must be plain data"),
    ):
        with pytest.raises(BadInput, match=match):
            ours(CHATML, messages)


def test_messages_that_are_nested_too_deep_are_refused():
    nested: list = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(BadInput, match="recursion"):
        ours(CHATML, [{**USER, "extra": nested}])
    while nested:  # freeing it all at once would recurse, too
        nested = nested.pop()


@pytest.mark.parametrize("source", [LLAMA_3, QWEN_2, GEMMA, ZEPHYR, CHATML, PARTS, PARTS_ONLY])
def test_parts_are_passed_as_the_template_expects_them(source):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    reads_parts = source in (PARTS, PARTS_ONLY)
    joined = "onetwo" if reads_parts else "one\ntwo"
    expected = ours(source, [{"role": "user", "content": joined}])
    assert ours(source, [{"role": "user", "content": parts}]) == expected
    assert ours(source, [{"role": "user", "content": tuple(parts)}]) == expected
    assert joined in expected
    assert "type" not in expected


ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "filtered loop": "{% for i in range(9999) %}{% for j in range(9999) if false %}{% endfor %}"
    "{% endfor %}",
    "comprehension": "{% for i in range(9999) %}{{ range(9999) | map('abs') | sum }}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(40) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "recursive loop": "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "writes": "{% for i in range(99999) %}{{ messages[0].content * 99 }}{% endfor %}",
    "literal": "{% for i in range(9999) %}" + "x" * 999 + "{% endfor %}",
    "literal in a block": "{% set t %}{% for i in range(9999) %}" + "x" * 999 + "{% endfor %}"
    "{% endset %}{{ t | length }}",
    "doubles +": "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}"
    "{% endfor %}",
    "doubles ~": "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}"
    "{% endfor %}",
    "doubles a block": "{% set n = namespace(s='ab') %}{% for i in range(99) %}"
    "{% set n.s %}{{ n.s }}{{ n.s }}{% endset %}{% endfor %}",
    "doubles a list": "{% set n = namespace(s=[1]) %}{% for i in range(99) %}"
    "{% set n.s = n.s + n.s %}{% endfor %}",
    "replaces": "{% set n = namespace(s='a') %}{% for i in range(99) %}"
    "{% set n.s = n.s.replace('a', 'aaa') %}{% endfor %}",
    "replaces by a filter": "{% set n = namespace(s='a') %}{% for i in range(99) %}"
    "{% set n.s = n.s | replace('a', 'aaa') %}{% endfor %}",
    "replaces at once": "{% set s = 'a' * 99999 %}{{ s.replace('a', s) }}",
    "joins at once": "{{ range(99999) | list | join('a' * 99999) }}",
    "range": "{{ range(10 ** 9) | list }}",
    "string": "{{ 'a' * 10 ** 11 }}",
    "string on the right": "{{ 10 ** 11 * 'a' }}",
    "list": "{{ [1] * 10 ** 11 }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "percent": "{{ '%99999999999d' % 1 }}",
    "percent star": "{{ '%*d' % (99999999999, 1) }}",
    "format": "{{ '{:99999999999}'.format(1) }}",
    "format nested": "{{ '{:{}}'.format(1, 99999999999) }}",
    "format filter": "{{ '%99999999999d' | format(1) }}",
    "center": "{{ 'x' | center(99999999999) }}",
    "ljust": "{{ 'x'.ljust(99999999999) }}",
    "bytes": "{{ 'x'.encode().ljust(99999999999) }}",
    "indent": "{{ ('\\n' * 99999) | indent(99999) }}",
    "indent of JSON": "{{ messages | tojson(indent=99999999999) }}",
    "batch": "{{ [1] | batch(99999999999, 'x') | list }}",
    "lorem": "{{ lipsum(n=99999) }}",
    "translate": "{{ 'aaa'.translate({97: 'b' * 99999}) }}",
}  # fmt: skip


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_template_without_end_is_stopped(kind, monkeypatch):
    from onelaunch.generation import sandbox

    monkeypatch.setattr(sandbox, "MAX_STEPS", 20_000)
    monkeypatch.setattr(sandbox, "MAX_CHARACTERS", 1 << 20)
    template = ChatTemplate(ENDLESS[kind])
    with pytest.raises(BadInput, match="was stopped|fails on these messages"):
        template.render([USER])


def test_the_bounds_are_wide_enough_for_a_long_conversation():
    turns = [USER, {"role": "assistant", "content": "x" * 500}] * 1000
    text = ours(QWEN_3, [*turns, USER])
    assert text.count("x") == 500_000


def test_the_output_has_a_bound():
    template = ChatTemplate("{{ messages[0].content }}{{ messages[0].content }}")
    half = "x" * (2 << 20)
    assert len(template.render([{"role": "user", "content": half}])) == 4 << 20
    with pytest.raises(BadInput, match="writes more than 4194304 characters"):
        template.render([{"role": "user", "content": half + "x"}])


def test_a_clock_stops_what_takes_long_in_each_step(monkeypatch):
    from onelaunch.generation import sandbox

    template = ChatTemplate("{% for i in range(200) %}.{% endfor %}")
    assert template.render([USER]) == "." * 200
    monkeypatch.setattr(sandbox, "MAX_SECONDS", -1.0)
    with pytest.raises(BadInput, match="loops for too long"):
        template.render([USER])


@pytest.mark.parametrize(
    "source",
    ["{{ ''.__class__.__mro__ }}", "{{ ().__class__.__bases__[0].__subclasses__() }}",
     "{{ messages.__init__.__globals__ }}", "{{ self.__init__.__globals__ }}",
     "{{ raise_exception.__globals__ }}", "{{ strftime_now.__globals__ }}",
     "{{ '{0.__class__.__mro__}'.format('') }}", "{{ namespace.__init__.__globals__ }}",
     "{% set n = namespace() %}{% set n.__class__ = 1 %}", "{{ namespace(__html__=1) }}",
     "{{ ''|attr('__class__')|attr('__mro__') }}", "{{ dict.__globals__ }}",
     "{% for x in [1] %}{{ loop.__class__.__mro__ }}{% endfor %}"],
)  # fmt: skip
def test_no_way_leads_out_of_the_sandbox(source):
    try:
        text = ours(source, [USER])
    except BadInput:
        return
    assert text.strip() == ""


def test_without_jinja2_the_extra_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtra, match=r"jinja2.*onelaunch\[serve\]"):
        ChatTemplate(CHATML)


def chat_tokenizer(folder: Path, **settings) -> JsonTokenizer:
    """The bytes, an end token, ChatML's two tokens, and BOS where `settings` say so."""
    pytest.importorskip("tokenizers")
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"]
    added = [token(256 + i, name) for i, name in enumerate(names)]
    template = None
    if settings.pop("adds_bos", False):
        template = {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [259], "tokens": ["<s>"]}},
        }
    data = json_tokenizer(added_tokens=added, post_processor=template)
    return JsonTokenizer(write_json_tokenizer(folder, data, tokenizer_config=settings))


def byte_ids(text: str) -> list[int]:
    """The ids of a text's bytes in `json_tokenizer`."""
    ids = {name: i for i, name in enumerate(byte_names())}
    return [ids[byte_names_by_value()[byte]] for byte in text.encode()]


def test_special_tokens_of_a_json_tokenizer_become_their_ids(tmp_path):
    tokenizer = chat_tokenizer(tmp_path)
    text = "<|im_start|>user\nhi<|im_end|>\n"
    assert prompt_ids(tokenizer, text) == [257, *byte_ids("user\nhi"), 258, *byte_ids("\n")]
    assert prompt_ids(tokenizer, "<s>hi") == [259, *byte_ids("hi")]
    assert tokenizer.special_tokens["<|im_end|>"] == 258


@pytest.mark.parametrize("name", ["qwen-2", "qwen-3", "mistral", "zephyr"])
def test_the_ids_are_those_of_transformers(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    model = small_model(260, chat_template=TEMPLATES[name])
    settings = {"bos_token": "<s>", "eos_token": "<|im_end|>"}
    chat = chat_format(model, chat_tokenizer(tmp_path, **settings))
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), chat_template=TEMPLATES[name], **settings
    )
    messages = TURNS[1:]
    expected = theirs.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert list(chat.prompt(messages).ids) == expected
    assert 258 in expected


def test_bos_comes_first_and_once(tmp_path):
    tokenizer = chat_tokenizer(tmp_path, adds_bos=True)
    assert prompt_ids(tokenizer, "hi") == [259, *byte_ids("hi")]
    assert prompt_ids(tokenizer, "<s>hi") == [259, *byte_ids("hi")]
    assert prompt_ids(tokenizer, "<s><s>hi") == [259, 259, *byte_ids("hi")]  # as it is written
    assert prompt_ids(tokenizer, "") == [259]
    adds_none = chat_tokenizer(tmp_path, bos_token="<s>")
    assert adds_none.bos_id == 259
    assert prompt_ids(adds_none, "<s><s>hi") == [259, 259, *byte_ids("hi")]
    assert prompt_ids(adds_none, "hi") == byte_ids("hi")


@pytest.mark.parametrize("tokenizer", [BytesTokenizer(), llama2c_tokenizer(" a", "b")])
def test_the_special_tokens_of_llama2c_become_their_ids(tokenizer):
    def plain(text: str) -> list[int]:
        return tokenizer.encode(text, bos=False)

    assert prompt_ids(tokenizer, "<s>a</s>b") == [1, *plain("a"), 2, *plain("b")]
    assert prompt_ids(tokenizer, "a") == [1, *plain("a")]
    assert prompt_ids(tokenizer, "</s>") == [1, 2]
    assert prompt_ids(tokenizer, "<s>") == [1]
    assert prompt_ids(tokenizer, "<s ></ s>") == [1, *plain("<s ></ s>")]
    assert prompt_ids(tokenizer, "") == [1]


def test_a_model_has_its_own_template_or_chatml(tmp_path):
    tokenizer = chat_tokenizer(tmp_path, bos_token="<s>", eos_token="<|im_end|>")
    own, is_own = chat_template(small_model(260, chat_template=ZEPHYR), tokenizer)
    assert is_own
    assert own.source == ZEPHYR
    assert own.render([USER]) == f"<|user|>\n{USER['content']}<|im_end|>\n<|assistant|>\n"
    other, is_own = chat_template(small_model(260), tokenizer)
    assert (other.source, is_own) == (CHATML, False)
    assert other.render(TURNS[:2]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy is the sky blue?<|im_end|>"
        "\n<|im_start|>assistant\n"
    )
    assert "<s>" in chat_template(small_model(260, chat_template=MISTRAL), BytesTokenizer())[
        0
    ].render([USER])
    with pytest.raises(BadInput, match=f"{tmp_path}.*does not compile: line 1"):
        chat_template(small_model(260, chat_template="{% x %}", source=tmp_path), tokenizer)


def test_chatml_is_qwens_without_its_system_message():
    messages = TURNS
    assert ours(CHATML, messages) == ours(QWEN_2, messages)


def test_a_turn_ends_at_the_token_or_the_tag_that_the_template_writes(tmp_path):
    tokenizer, plain = chat_tokenizer(tmp_path), BytesTokenizer()

    def end(source: str, tokenizer) -> tuple:
        return end_of_turn(ChatTemplate(source, "<s>", "</s>"), tokenizer)

    assert end(QWEN_2, tokenizer) == ((258,), ())
    assert end(CHATML, tokenizer) == ((258,), ())
    assert end(CHATML, plain) == ((), ("<|im_end|>", "<|im_start|>"))
    assert end(QWEN_2, plain) == ((), ("<|im_end|>",))
    assert end(GEMMA, plain) == ((), ("<end_of_turn>",))
    assert end(LLAMA_3, plain) == ((), ("<|eot_id|>",))
    assert end(ZEPHYR, plain) == ((2,), ())
    assert end(MISTRAL, plain) == ((2,), ())
    assert end(PARTS, plain) == ((), ())
    assert end("nothing", plain) == ((), ())
    assert end("{{ raise_exception('no') }}", plain) == ((), ())


def conversation(context: int = 200, limit: int = 40, system: str = "", template=None):
    model = small_model(259, chat_template=template)
    model.config = model.config.with_(max_seq_len=context)
    chat = chat_format(model, BytesTokenizer())
    return chat, Conversation(chat, limit, system)


def test_a_conversation_keeps_what_fits_and_its_system_message():
    chat, talk = conversation(context=400, limit=60, system="Be brief.")
    rng = random.Random(5)
    dropped = 0
    for turn in range(12):
        before = talk.messages
        n = talk.ask("x" * rng.randrange(1, 60))
        dropped += n
        messages = talk.messages
        assert messages[0] == {"role": "system", "content": "Be brief."}
        assert messages[1]["role"] == "user"
        assert messages[-1]["role"] == "user"
        assert len(chat.prompt(messages).ids) <= 400 - 60
        if n:  # no more than needed
            kept = len(messages) - 2  # without the system message and the new one
            more = [before[0], *before[len(before) - kept - 2 :], messages[-1]]
            assert len(chat.prompt(more).ids) > 400 - 60
        talk.answer(f"answer {turn}")
    assert dropped > 3


def test_at_most_a_quarter_of_the_context_is_kept_free_for_the_answer():
    chat, talk = conversation(context=400, limit=10_000)
    overhead = len(chat.prompt([USER]).ids) - len(USER["content"])
    assert talk.ask("a" * 10) == 0
    talk.answer("b" * 10)
    used = len(chat.prompt([*talk.messages, {"role": "user", "content": ""}]).ids)
    assert talk.ask("c" * (300 - used)) == 0
    talk.withdraw()
    assert talk.ask("c" * (301 - used)) == 1
    talk.reset()
    assert talk.ask("d" * (400 - overhead)) == 0  # alone it may fill the context
    talk.withdraw()
    with pytest.raises(BadInput, match=r"the message has 401 tokens in .* holds 400"):
        talk.ask("d" * (401 - overhead))
    assert talk.messages == []


def test_a_system_message_that_the_template_has_not_changes_nothing():
    _, talk = conversation(template=GEMMA)
    talk.ask("hi")
    with pytest.raises(BadInput, match="System role not supported"):
        talk.set_system("Be brief.")
    assert [m["role"] for m in talk.messages] == ["user"]
    with pytest.raises(BadInput, match="holds 200"):
        conversation(system="x" * 200)
    with pytest.raises(BadInput, match="System role not supported"):
        conversation(template=GEMMA, system="Be brief.")


def test_an_id_outside_the_models_vocabulary_is_refused(tmp_path):
    chat = chat_format(small_model(258), chat_tokenizer(tmp_path))
    with pytest.raises(BadInput, match="'<|im_end|>' is id 258"):
        chat.prompt([USER])
