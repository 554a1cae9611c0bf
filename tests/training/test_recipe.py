"""Recipes: strict keys, types, ranges, the learning rate."""

import math
import re

import pytest

from onelaunch.config import PRESETS
from onelaunch.errors import BadInput
from onelaunch.training.recipe import BUILT_IN, MAX_ACCUM, Recipe, parse_setting


def with_set(*texts: str) -> Recipe:
    return Recipe().with_settings(dict(parse_setting(t) for t in texts), "--set")


@pytest.mark.parametrize("path", sorted(BUILT_IN.glob("*.toml")), ids=lambda p: p.stem)
def test_built_in_recipes_load_and_survive_resolving(path):
    recipe = Recipe.load(path.stem)
    again = Recipe.parse(recipe.to_toml().encode(), "resolved")
    assert again == recipe
    assert recipe.model_config(512 if path.stem == "quickstart" else 259).n_params > 1e5


def test_toml_keeps_every_kind_of_value():
    recipe = with_set(
        'data.path="a\\\\b \\"c\\" \\u007f"',
        "train.compile=true",
        "optimizer.lr=1e-05",
        "model.dim=8",
    )
    assert recipe.data.path == 'a\\b "c" \x7f'
    assert Recipe.parse(recipe.to_toml().encode(), "resolved") == recipe


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("train.acum=3", "did you mean train.accum?"),
        ("lr=3", "did you mean optimizer.lr?"),
        ("trian.accum=2", "did you mean train?"),
        ("optimizer.lr=fast", "must be a number"),
        ("train.updates=1.5", "must be a whole number"),
        ("train.updates=true", "must be a whole number"),
        ("train.compile=1", "must be true or false"),
        ("data.path=7", "must be a string"),
        ("train.accum=0", "from 1 to 1000"),
        ("train.accum=1001", "from 1 to 1000"),
        ("train.dropout=0.96", "from 0.0 to 0.95"),
        ("optimizer.lr=nan", "must be from"),
        ("optimizer.lr_rule=cubic", "must be one of"),
        ("train.dtype=float16", "must be one of"),
        ("model.preset=stories15", "unknown preset"),
    ],
)
def test_a_wrong_setting_is_one_line_that_helps(setting, words):
    with pytest.raises(BadInput, match=r"^--set") as caught:
        with_set(setting)
    assert words in str(caught.value)
    assert re.split("[.=]", setting)[0] in str(caught.value) or words == "unknown preset"


@pytest.mark.parametrize("text", ["", "a", "=3"])
def test_a_setting_needs_an_equals_sign(text):
    with pytest.raises(BadInput, match="section.key=value"):
        parse_setting(text)


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("[train]\nupdate = 3", "did you mean train.updates?"),
        ("[trains]\nupdates = 3", "did you mean train?"),
        ("train = 3", "must be a section"),
        ("[train\n", "not valid TOML"),
        ("\x00", "not valid TOML"),
        ("a = " + "[" * 100_000, "not valid TOML"),
    ],
)
def test_a_wrong_file_is_one_line_that_helps(tmp_path, toml, words):
    path = tmp_path / "recipe.toml"
    path.write_text(toml)
    with pytest.raises(BadInput) as caught:
        Recipe.load(str(path))
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_recipe_names_the_built_in_ones():
    with pytest.raises(BadInput, match="quickstart"):
        Recipe.load("quickstrat")


def test_accum_reaches_both_ends():
    assert with_set("train.accum=1").train.accum == 1
    assert with_set(f"train.accum={MAX_ACCUM}").train.accum == MAX_ACCUM


def test_the_source_rule_scales_the_rate_with_accumulation():
    at_100 = ("train.accum=100", "optimizer.lr=3e-4", "optimizer.warmup=0")
    assert with_set(*at_100, "optimizer.lr_rule=linear").learning_rate(0) == pytest.approx(3e-3)
    sqrt = with_set(*at_100, "optimizer.lr_rule=sqrt").learning_rate(0)
    assert sqrt == pytest.approx(3e-4 * math.sqrt(10))
    assert with_set(*at_100).learning_rate(0) == pytest.approx(3e-4)
    halved = with_set(*at_100, "optimizer.lr_rule=linear", "optimizer.lr_base_accum=200")
    assert halved.learning_rate(0) == pytest.approx(1.5e-4)
    for rule in ("none", "linear", "sqrt"):  # two processes do twice the micro-steps
        half, whole = (
            with_set(f"train.accum={accum}", f"optimizer.lr_rule={rule}") for accum in (7, 14)
        )
        assert half.learning_rate(50, ranks=2) == whole.learning_rate(50)


def test_learning_rate_warms_up_and_falls_to_its_floor():
    recipe = with_set(
        "train.updates=1000",
        "optimizer.lr=1.0",
        "optimizer.warmup=100",
        "optimizer.min_lr_ratio=0.1",
    )
    assert recipe.learning_rate(0) == pytest.approx(0.01)
    assert recipe.learning_rate(99) == pytest.approx(1.0)
    assert recipe.learning_rate(100) == pytest.approx(1.0)
    assert recipe.learning_rate(550) == pytest.approx(0.55)
    assert recipe.learning_rate(1000) == pytest.approx(0.1)
    rates = [recipe.learning_rate(n) for n in range(100, 1001)]
    assert rates == sorted(rates, reverse=True)


def test_the_vocabulary_is_the_datas_unless_named():
    assert with_set("model.preset=stories15m").model_config(259).vocab_size == 259
    padded = with_set("model.preset=stories15m", "model.vocab_size=320")
    assert padded.model_config(259).vocab_size == 320
    with pytest.raises(BadInput, match="258.*259"):
        with_set("model.preset=stories15m", "model.vocab_size=258").model_config(259)
    kept = with_set("model.preset=stories260k").model_config(512)
    assert kept == PRESETS["stories260k"]


def test_a_preset_takes_changes_and_a_changed_width_a_new_head_width():
    config = with_set("model.preset=stories260k", "model.dim=128").model_config(512)
    assert (config.dim, config.head_dim, config.n_kv_heads) == (128, 16, 8)


def test_an_incomplete_model_names_the_file_and_what_is_missing(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("[model]\ndim = 64\nn_heads = 4\nhidden_dim = 128\n")
    wanted = r"mine\.toml: \[model\] has no n_layers, max_seq_len; .*preset = "
    with pytest.raises(BadInput, match=wanted):
        Recipe.load(str(path)).model_config(512)
    whole = Recipe.load(str(path)).with_settings(
        {"model.n_layers": 2, "model.max_seq_len": 32, "model.n_heads": 5}, "--set"
    )
    with pytest.raises(BadInput, match=r"mine\.toml: \[model\]: dim 64 .*n_heads 5"):
        whole.model_config(512)


def test_where_a_recipe_was_read_from_makes_no_difference(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(Recipe().to_toml())
    assert Recipe.load(str(path)) == Recipe()
    with pytest.raises(BadInput, match="unknown key source"):
        Recipe.from_dict({"source": "x"}, "test")


def test_a_byte_order_mark_is_no_part_of_a_recipe(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xef\xbb\xbf[train]\nupdates = 7\n")
    assert Recipe.load(str(path)).train.updates == 7
    path.write_bytes("[train]\nupdates = 7\n".encode("utf-16"))
    with pytest.raises(BadInput, match=r"mine\.toml: .*UTF-16.*UTF-8"):
        Recipe.load(str(path))
