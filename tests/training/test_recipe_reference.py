"""docs/recipes.md is what the classes say, and what it says is what is checked."""

import dataclasses
import math
import re
import runpy
from pathlib import Path
from typing import get_type_hints

import pytest

from onelaunch import cli
from onelaunch.config import PRESETS, ModelConfig
from onelaunch.errors import BadInput
from onelaunch.training.recipe import BUILT_IN, SECTIONS, Recipe
from onelaunch.training.sections import TRAIN_WITH, Key, described_keys, key

ROOT = Path(__file__).parents[2]
TOOL = runpy.run_path(str(ROOT / "tools/recipe_reference.py"))
REMAKE = "docs/recipes.md is old: run make recipes"
CLASSES = {name: get_type_hints(Recipe)[name] for name in SECTIONS}
KEYS = {
    f"{name}.{field.name}": described
    for name, section in CLASSES.items()
    for field, described in described_keys(section)
}
BOUNDED = [name for name, described in KEYS.items() if described.within is not None]
CHOSEN = [name for name, described in KEYS.items() if described.choices]
OF_THE_SHAPE = [name for name in BOUNDED if name.startswith("model.")]


def kept() -> str:
    return (ROOT / "docs/recipes.md").read_text(encoding="utf-8")


def recipe(name: str, value: object) -> Recipe:
    return Recipe().with_settings({name: value}, "--set")


def beyond(described: Key) -> tuple[float, float]:
    """The nearest numbers outside a range."""
    low, high = described.within
    if isinstance(low, int) and isinstance(high, int):
        return low - 1, high + 1
    return math.nextafter(low, -math.inf), math.nextafter(high, math.inf)


def test_the_kept_reference_is_what_the_classes_say():
    assert kept() == TOOL["document"](), REMAKE
    assert TOOL["TARGET"] == ROOT / "docs/recipes.md"
    assert "| 0 to 9,223,372,036,854,775,807 |" in kept()


def test_the_reference_is_read_anywhere():
    text = kept()
    assert text.isascii()
    assert not [line for line in text.splitlines() if len(line) >= 100 and line[0] != "|"]
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (ROOT / "docs" / link).is_file(), link
    for name in [*PRESETS, *[f"[{path.stem}]" for path in BUILT_IN.glob("*.toml")]]:
        assert name in text, REMAKE


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_has_a_meaning_and_a_row_in_its_sections_table(section):
    _, _, rest = kept().partition(f"\n## [{section}]\n")
    table = [line for line in rest.partition("\n## ")[0].splitlines() if line.startswith("| `")]
    names = [field.name for field in dataclasses.fields(CLASSES[section])]
    assert [line.split("`")[1] for line in table] == names, REMAKE
    for name in names:
        described = KEYS[f"{section}.{name}"]
        assert re.fullmatch(r"[A-Z].{9,}\.", described.meaning), f"{section}.{name}"
    # dataclass makes a docstring where there is none: the class's signature
    assert not CLASSES[section].__doc__.startswith(CLASSES[section].__name__)


def test_a_key_without_a_meaning_is_found():
    @dataclasses.dataclass
    class Section:
        """A section."""

        one: int = key(1, "A meaning.")
        other: int = 2

    with pytest.raises(TypeError, match="other has no description"):
        described_keys(Section)


def test_the_example_is_a_recipe():
    (example,) = re.findall(r"```toml\n(.*?)```", kept(), re.DOTALL)
    loaded = Recipe.parse(example.encode(), "the example")
    assert re.findall(r"^\[(\w+)\]", example, re.MULTILINE) == list(SECTIONS)
    config = loaded.model_config(512)
    assert (config.head_dim, config.n_kv_heads, config.n_layers) == (12, 4, 5)
    assert 0.555e6 < config.n_params < 0.565e6
    assert loaded.train.accum * loaded.train.batch_size * loaded.train.seq_len == 4096
    assert loaded.train.seq_len < config.max_seq_len
    assert loaded != Recipe.load("quickstart")


def test_a_range_that_is_shown_is_the_one_that_is_checked():
    assert len(BOUNDED) > 25
    for name in BOUNDED:
        for value in KEYS[name].within:
            section, field = name.split(".")
            assert getattr(getattr(recipe(name, value), section), field) == value
        for value in beyond(KEYS[name]):
            with pytest.raises(BadInput, match=f"{re.escape(name)} = .*: must be from"):
                recipe(name, value)


@pytest.mark.parametrize("name", CHOSEN)
def test_choices_that_are_shown_are_the_ones_that_are_checked(name):
    for value in KEYS[name].choices:
        recipe(name, value)
    with pytest.raises(BadInput, match=f"{re.escape(name)} = 'none of them': .*one of"):
        recipe(name, "none of them")


@pytest.mark.parametrize("name", OF_THE_SHAPE)
def test_no_shape_outside_a_range_that_is_shown_is_a_model(name):
    field = name.removeprefix("model.")
    shape = PRESETS["stories260k"].to_dict()
    low, high = KEYS[name].within
    for value in (low - 1, high + 1):
        with pytest.raises(BadInput, match=rf"{field} .* to {high},"):
            ModelConfig.from_dict(shape | {field: value})


@pytest.mark.parametrize("name", ["norm_eps", "rope_theta"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_what_must_be_positive_and_finite(name, value):
    assert KEYS[f"model.{name}"].allowed == "positive, finite"
    with pytest.raises(BadInput, match="must be positive and finite"):
        recipe(f"model.{name}", value).with_settings(
            {"model.preset": "stories260k"}, "test"
        ).model_config(512)


def test_what_the_model_section_says_of_shapes():
    about = CLASSES["model"].__doc__
    for name in ModelConfig.required_fields():
        assert (f"`{name}`" in about) == (name != "vocab_size")
    scaled = [name for name, config in PRESETS.items() if config.rope_scaling is not None]
    assert f"({', '.join(scaled)})" in about


@pytest.mark.parametrize(
    ("engine", "name"), [(engine, name) for engine, keys in TRAIN_WITH.items() for name in keys]
)
def test_with_these_engines_only_what_is_shown_is_taken(engine, name):
    other = {"dropout": 0.5, "compile": True, "device": "cuda", "dtype": "bfloat16"}
    other |= {"norm": "onelaunch", "recompute": "layers"}
    for value in TRAIN_WITH[engine][name]:
        recipe("train.engine", engine).with_settings({f"train.{name}": value}, "--set")
    with pytest.raises(BadInput, match=f"train.{name} = .*: .*{engine}"):
        recipe("train.engine", engine).with_settings({f"train.{name}": other[name]}, "--set")


def test_an_option_sets_the_key_that_is_shown(monkeypatch, tmp_path):
    started = []

    def start(recipe, *rest, **options):
        started.append(recipe)
        raise BadInput("started")

    monkeypatch.setattr("onelaunch.training.train.start", start)
    values = {"--preset": "stories15m", "--data": "folder", "--accum": "7", "--device": "mps"}
    values |= {"--engine": "coreml", "--compile-budget": "9", "--init": "model.bin"}
    assert set(values) == set(TOOL["OPTIONS"])
    for option, value in values.items():
        name, run = TOOL["OPTIONS"][option], str(tmp_path / "run")
        section, _, field = name.partition(".")
        assert cli.run(["train", "quickstart", option, value, "--run", run]) == 2
        default = Recipe.load("quickstart")
        changed = {name: int(value) if value.isdigit() else value}
        assert started.pop() == default.with_settings(changed, "test")
        # --set overrides --preset, --init and --data; the other options override it
        other = {"--preset": "stories42m", "--data": "other", "--accum": "8", "--device": "cpu"}
        other |= {"--engine": "reference", "--compile-budget": "8", "--init": "other.bin"}
        words = [option, value, "--set", f"{name}={other[option]}"]
        assert cli.run(["train", "quickstart", *words, "--run", run]) == 2
        wins = other[option] if option in ("--preset", "--init", "--data") else value
        assert str(getattr(getattr(started.pop(), section), field)) == wins
