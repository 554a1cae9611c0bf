"""Write docs/recipes.md, the reference of training recipes, from the classes that define them.

Run it after a change of training/sections.py, of the presets or of the built-in recipes:

    make recipes
"""

from __future__ import annotations

import inspect
import textwrap
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from onelaunch.config import PRESETS, ModelConfig
from onelaunch.errors import BadInput
from onelaunch.training.recipe import BUILT_IN, MAX_BYTES, SECTIONS, Recipe, toml_value
from onelaunch.training.sections import TRAIN_WITH, Key, described_keys

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "docs/recipes.md"
TYPES = {bool: "boolean", int: "integer", float: "float", str: "string"}

OPTIONS = {
    "--preset": "model.preset",
    "--init": "train.init",
    "--data": "data.path",
    "--accum": "train.accum",
    "--device": "train.device",
    "--engine": "train.engine",
    "--compile-budget": "coreml.compile_budget",
}
"""The options of `onelaunch train` that set one key."""

EXAMPLE = """\
# The built-in stories, with a model a little wider than stories260k: 0.56 million parameters.

[model]
preset = "stories260k"    # 5 layers, 8 heads, 4 key and value heads
dim = 96                  # replaces the preset's 64, so a head is 96 / 8 = 12 wide
n_kv_heads = 4            # named again, as a new width makes it 8
hidden_dim = 256
max_seq_len = 256

[data]
path = "stories"          # or a folder made by `onelaunch prepare`

[train]
updates = 2000
batch_size = 16
seq_len = 128             # shorter than the context
accum = 2                 # 2 x 16 x 128 = 4,096 tokens per update
dropout = 0.05
seed = 7

[optimizer]
lr = 4e-3
beta2 = 0.99
weight_decay = 0.05
warmup = 100
min_lr_ratio = 0.05

[eval]
every = 250
batches = 8

[checkpoint]
every = 250
minutes = 5
keep = 3

[log]
tensorboard = "charts"    # needs onelaunch[log]

[coreml]                  # read with engine = "coreml" in [train] only
fusion_depth = "half"
staleness = 1
"""

INTRODUCTION = """\
# Training recipes

Made from `src/onelaunch/training/sections.py` by `make recipes`. Do not edit it: make it again.

A recipe is a TOML file that fixes a training run: the model's shape, the data, the updates, the
optimizer, evaluation and checkpoints. It names the model's preset or shape, and of the other keys
those that differ from their defaults. It is UTF-8, of at most {max_bytes} bytes.

    onelaunch train mine.toml --set optimizer.lr=3e-3 --set train.accum=4
    onelaunch train shakespeare-char --data data/shakespeare    # a built-in recipe
    onelaunch train --preset stories15m     # no recipe: every other key has its default
    onelaunch train --init stories15M.bin --data book    # from a model's weights, with its shape
    onelaunch train mine.toml --plan        # what would run, its memory and time; trains nothing
    onelaunch train                         # none of these: the built-in recipe quickstart

`--set section.key=value` changes one key and may be repeated. The value is read as TOML, or as a
string where it is not valid TOML: `--set train.device=cpu` needs no quotes. Some keys have an
option of their own:

{options}

`--preset`, `--init` and `--data` override the recipe, `--set` overrides these, and the other
options override `--set`.

An unknown section or key, a value of another type, and a value that is not allowed are refused
before anything is written, with exit code 2 and one line:

    $ onelaunch train --set train.acum=4
    onelaunch: {error}

A run folder keeps the recipe, with all defaults and settings, as `recipe.toml`. `onelaunch train
--resume` continues with that one. `--set` changes it; the model and the data must stay the same.

In the tables below, a range includes both ends, and a float may be written as an integer.
"""


def document() -> str:
    """The whole reference, as Markdown."""
    blocks = [_introduction(), _built_in(), _presets()]
    blocks += [_section(name) for name in SECTIONS]
    blocks.append(f"## A complete example\n\n```toml\n{EXAMPLE}```\n")
    return "\n".join(blocks)


def _introduction() -> str:
    try:
        Recipe().with_settings({"train.acum": 4}, "--set")
    except BadInput as error:
        refused = str(error)
    options = _table(["option", "key"], [[f"`{o}`", f"`{key}`"] for o, key in OPTIONS.items()])
    return INTRODUCTION.format(
        max_bytes=_number(MAX_BYTES), options=options.rstrip(), error=refused
    )


def _built_in() -> str:
    rows = []
    for path in sorted(BUILT_IN.glob("*.toml")):
        comment = path.read_text("utf-8").splitlines()[0].removeprefix("# ")
        link = f"../{path.relative_to(ROOT).as_posix()}"
        rows.append([f"[{path.stem}]({link})", comment.split(". ")[0].rstrip(".") + "."])
    return "## Built-in recipes\n\n" + _table(["name", "what it trains"], rows)


def _presets() -> str:
    shown = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "max_seq_len")
    rows = [
        [f"`{name}`", f"{config.n_params / 1e6:,.4g}"]
        + [_number(getattr(config, field)) for field in (*shown, "vocab_size")]
        for name, config in PRESETS.items()
    ]
    titles = ["preset", "million parameters", *[f"`{name}`" for name in (*shown, "vocab_size")]]
    about = "Parameters are counted with the preset's own vocabulary; a recipe takes the data's."
    return f"## Presets\n\n{about}\n\n" + _table(titles, rows)


def _section(name: str) -> str:
    kind = get_type_hints(Recipe)[name]
    types = get_type_hints(kind)
    rows = [
        [
            f"`{field.name}`",
            _type_name(types[field.name]),
            _default(name, field.name, field.default),
            _allowed(key),
            key.unit,
            key.meaning,
        ]
        for field, key in described_keys(kind)
    ]
    titles = ["key", "type", "default", "allowed", "unit", "meaning"]
    about = (inspect.getdoc(kind) or "").split("\n\n")
    if name == "coreml":
        about.append(f'With `train.engine = "coreml"`, [train] takes only {_restricted()}.')
    return "\n\n".join([f"## [{name}]", *map(_wrapped, about), _table(titles, rows)])


def _type_name(kind: Any) -> str:
    return next(TYPES[each] for each in (get_args(kind) or (kind,)) if each in TYPES)


def _default(section: str, key: str, value: Any) -> str:
    """The default as TOML, or in words where it is the data's or the preset's."""
    if value is not None:
        return f"`{toml_value(value)}`"
    assert section == "model", f"{section}.{key}: say what an unset key means"
    if key == "vocab_size":
        return "the data's"
    if key in ModelConfig.required_fields():
        return "the preset's"
    otherwise = next(field.default for field in fields(ModelConfig) if field.name == key)
    return f"the preset's, else `{toml_value(otherwise)}`"


def _allowed(key: Key) -> str:
    if key.within is not None:
        low, high = key.within
        return f"{_number(low)} to {_number(high)}"
    return key.allowed or ", ".join(f"`{toml_value(choice)}`" for choice in key.choices)


def _number(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"  # exact, where ".0f" would round 2**63 - 1
    return f"{value:,.0f}" if value >= 1000 else repr(value)


def _restricted() -> str:
    found = []
    for key, values in TRAIN_WITH["coreml"].items():
        found.append(" or ".join(f"`{key} = {toml_value(value)}`" for value in values))
    return "; ".join(found)


def _table(titles: list[str], rows: list[list[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(c.replace('|', chr(92) + '|') for c in r)} |\n" for r in lines)


def _wrapped(text: str) -> str:
    """A paragraph in lines of fewer than 100 columns."""
    return textwrap.fill(text, 99, break_long_words=False, break_on_hyphens=False)


def main() -> None:
    """Write the reference."""
    TARGET.write_text(document(), encoding="utf-8")
    print(TARGET.relative_to(ROOT))


if __name__ == "__main__":
    main()
