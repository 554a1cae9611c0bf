"""Which engines run what takes a model beyond the layers of Llama and Qwen3: the reference engine
all of it, the CPU engine biases, and each engine names the field that it does not compute."""

from __future__ import annotations

import pytest
import torch

from onelaunch import load
from onelaunch.checkpoints import save
from onelaunch.checkpoints.weights import LoadedModel
from onelaunch.config import FAMILY_FIELDS
from onelaunch.engines import cpu, cuda
from onelaunch.engines.choice import automatic, automatic_for_evaluation, choose
from onelaunch.engines.inspection import inspect
from onelaunch.errors import BadInput
from onelaunch.plan import make_plan, make_training_plan
from onelaunch.training.engines import engine_name
from onelaunch.training.recipe import Recipe
from tests.engines.suite import SMALL, weights_of

BEYOND = {
    "qkv_bias": {"qkv_bias": True},
    "norm_placement": {"norm_placement": "post"},
    "norm_offset": {"norm_offset": 1.0},
    "activation": {"activation": "gelu_tanh"},
    "embedding_scale": {"embedding_scale": 5.0},
    "attention_scale": {"attention_scale": 0.5},
    "logit_softcap": {"logit_softcap": 30.0},
    "sliding_window": {"sliding_window": 8},
    "layers_without_rope": {"layers_without_rope": (1,)},
    "qk_norm": {"qk_norm": "full"},
}
by_field = pytest.mark.parametrize("field", BEYOND)
unplanned = pytest.mark.parametrize("field", sorted({*BEYOND} - {"qkv_bias"}))


def test_every_field_is_here():
    of_windows = {"sliding_layers", "sliding_rope_theta"}  # there is none without a sliding_window
    assert {*BEYOND} == {*FAMILY_FIELDS, "qk_norm"} - of_windows


@unplanned
def test_auto_is_pytorch_on_a_cpu_and_says_why(field):
    config, lines = SMALL.with_(**BEYOND[field]), []
    assert [each.split("=")[0] for each in config.extensions] == [field]
    engine = choose("auto", config, weights_of(config), "cpu", log=lines.append)
    assert engine.describe()["engine"] == "reference"
    (line,) = lines
    assert line.startswith("PyTorch runs this model")
    assert line.endswith(f"it does not compute {config.extensions[0]}")


@by_field
def test_auto_is_pytorch_on_a_gpu_and_in_training(field):
    config, device = SMALL.with_(**BEYOND[field]), torch.device("cuda", 0)
    assert automatic(device, config, None, None) == "reference"
    assert automatic_for_evaluation(device, config, "bfloat16", None) == "reference"
    assert cuda.why_not(device, config) == f"it does not compute {config.extensions[0]}"
    recipe = Recipe().with_settings({"train.device": "cpu"}, "test")
    assert engine_name(recipe, config) == "reference"


@pytest.mark.skipif(cpu.why_not() is not None, reason="the CPU engine cannot run here")
def test_auto_is_the_cpu_engine_for_biases():
    assert automatic(torch.device("cpu"), SMALL.with_(qkv_bias=True), None, None) == "cpu"
    make_plan(SMALL.with_(qkv_bias=True))


@by_field
def test_plans_have_no_such_stage(field):
    config = SMALL.with_(**BEYOND[field])
    for make in (make_plan, make_training_plan)[field == "qkv_bias" :]:
        with pytest.raises(BadInput) as caught:
            make(config, 1, 4)
        assert str(caught.value).startswith(f"{config.extensions[0]}: plans ")


@by_field
@pytest.mark.skipif(cpu.why_not() is not None, reason="the CPU engine cannot run here")
def test_the_cpu_engine_names_the_field(field):
    from onelaunch.engines.cpu.training.engine import CpuTrainer

    config = SMALL.with_(**BEYOND[field])
    expected = f"engine='cpu': it does not compute {config.extensions[0]}; use engine='reference'"
    for make in (lambda *of: choose("cpu", *of), CpuTrainer)[field == "qkv_bias" :]:
        with pytest.raises(BadInput) as caught:
            make(config, weights_of(config))
        assert str(caught.value) == expected


@by_field
def test_the_core_ml_engine_names_the_field(field, tmp_path):
    pytest.importorskip("coremltools")
    from onelaunch.engines.coreml.export import checked
    from onelaunch.engines.coreml.training import CoreMLTrainer

    config = SMALL.with_(**BEYOND[field])
    for make in (lambda *of: choose("coreml", *of), CoreMLTrainer):
        with pytest.raises(BadInput, match="^engine='coreml': it does not compute ") as caught:
            make(config, weights_of(config))
        assert config.extensions[0] in str(caught.value)
    with pytest.raises(BadInput, match="^format='coreml': ") as caught:
        checked(config, tmp_path / "out.mlpackage", None, None, "none")
    assert config.extensions[0] in str(caught.value)


@by_field
def test_a_llama2c_file_cannot_store_it(field, tmp_path):
    config = SMALL.with_(**BEYOND[field])
    with pytest.raises(BadInput, match="^format='llama2c': the file cannot store ") as caught:
        save(LoadedModel(config, weights_of(config)), tmp_path / "model.bin", "llama2c")
    assert config.extensions[0] in str(caught.value)
    assert not (tmp_path / "model.bin").exists()


def test_inspect_has_no_plan_of_it():
    config = SMALL.with_(norm_placement="post", qk_norm="full")
    loaded = LoadedModel(config, weights_of(config))
    facts = inspect(loaded)
    assert (facts["plan"], facts["choices"], facts["prefetch"]) == (None, [], [])
    assert facts["config"] == config.to_dict()
    for arguments, begin in (
        ({"fusion_depth": "half"}, "fusion_depth='half': "),
        ({"training": (2, 8)}, "training='2x8': "),
    ):
        with pytest.raises(BadInput, match=r"plans .* norm_placement='post'") as caught:
            inspect(loaded, **arguments)
        assert str(caught.value).startswith(begin)
    biased = SMALL.with_(qkv_bias=True)
    with pytest.raises(BadInput, match="^training='2x8': .* qkv_bias=True"):
        inspect(LoadedModel(biased, weights_of(biased)), training=(2, 8))


def test_a_folder_of_the_hub_generates(tmp_path):
    """From a file to tokens through the public interface, which says which engine runs."""
    config = SMALL.with_(
        qk_norm=True, norm_placement="both", norm_offset=1.0, activation="gelu_tanh",
        embedding_scale=32**0.5, sliding_window=4, sliding_layers=(0,), sliding_rope_theta=100.0,
        rope_theta=1e6,
    )  # fmt: skip
    weights = weights_of(config)
    save(LoadedModel(config, weights, bos_id=1, stop_ids=(1, 2)), tmp_path / "hf", "hf")
    lines = []
    with load(tmp_path / "hf", device="cpu", log=lines.append) as model:
        assert model.config == config
        tokens = model.logits([[5, 6, 7, 8, 9, 10]])
        assert tokens.shape == (1, 6, 61)
        assert model.describe()["engine"] == "reference"
    assert any("it does not compute norm_placement='both'" in line for line in lines)
