"""Operations of a token, peaks by the name of a GPU, and the rates in records and display."""

import os
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from onelaunch.config import PRESETS, ModelConfig
from onelaunch.model import Model
from onelaunch.training import run as runs
from onelaunch.training.clock import PARTS
from onelaunch.training.display import Display
from onelaunch.training.flops import (
    TrainingFlops,
    flops_per_token,
    format_rate,
    peak_flops,
    training_flops,
)
from onelaunch.training.recipe import Recipe
from tests.kills import SETTINGS
from tests.metrics import read_metrics
from tests.training.test_display import HEADER, update_record


@pytest.mark.parametrize("tied", [True, False])
def test_operations_are_those_that_pytorch_counts(tied):
    """Forward; forward and backward are three times as many."""
    config = ModelConfig(
        dim=24, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=10, hidden_dim=40, vocab_size=50,
        max_seq_len=16, qk_norm=True, tied_embeddings=tied,
    )  # fmt: skip
    model = Model(config).init_weights(0)
    tokens_BS = torch.randint(50, (2, 16))
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(tokens_BS)
    assert 3 * counter.get_total_flops() == flops_per_token(config, 16) * tokens_BS.numel()


def test_attention_grows_with_the_sequence():
    config = PRESETS["stories15m"]
    assert flops_per_token(config, 0) == 6 * (config.n_params - 13 * 288)  # but the norms
    assert flops_per_token(config, 256) - flops_per_token(config, 0) == 12 * 6 * 288 * 256


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989.5e12),
        ("NVIDIA H200 NVL", 835.5e12),
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA GH200 480GB", 989.5e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("NVIDIA H20", None),
        ("NVIDIA A1000", None),
        ("", None),
    ],
)
def test_a_peak_is_that_of_the_very_gpu_or_unknown(name, peak):
    assert peak_flops(name, "bfloat16") == peak
    assert peak_flops(name, "float32") is None


def test_rates_leave_out_evaluation_and_checkpoints():
    seconds = dict.fromkeys(PARTS, 0.0) | {"evaluation": 3.0, "checkpoint": 1.0, "wall": 6.0}
    assert TrainingFlops(10).rates(100, seconds) == {"flops_per_second": 500.0}
    known = TrainingFlops(10, peak=2000.0).rates(100, seconds)
    assert known == {"flops_per_second": 500.0, "mfu": 0.25}
    assert TrainingFlops(10).rates(100, seconds | {"wall": 4.0}) == {"flops_per_second": 0.0}


def test_on_a_cpu_there_is_no_peak():
    flops = training_flops(PRESETS["stories15m"], 256, torch.device("cpu"), "bfloat16")
    assert flops == TrainingFlops(flops_per_token(PRESETS["stories15m"], 256), None)


def test_an_update_records_what_it_computed_each_second(tmp_path):
    settings = SETTINGS | {"train.updates": 3, "train.seq_len": 16, "eval.every": 1}
    recipe = Recipe().with_settings(settings, "test")
    runs.start(recipe, tmp_path / "run", quiet=True)
    per_token = flops_per_token(recipe.model_config(512), 16)
    updates = [r for r in read_metrics(tmp_path / "run/metrics.jsonl") if r["kind"] == "update"]
    for record in updates:
        assert "mfu" not in record
        seconds = record["seconds"]
        time = seconds["wall"] - seconds["evaluation"] - seconds["checkpoint"]
        assert record["flops_per_second"] == pytest.approx(per_token * 3 * 4 * 16 / time)
    assert updates[1]["seconds"]["evaluation"] > 0


@pytest.mark.parametrize(
    ("rate", "text"),
    [(4.125e14, "412 TFLOP/s"), (1e12, "1 TFLOP/s"), (9.5e11, "950 GFLOP/s"), (2e7, "20 MFLOP/s")],
)
def test_rates_in_words(rate, text):
    assert format_rate(rate) == text


@pytest.mark.parametrize(
    ("peak", "shown"), [(None, ("compute", "320 MFLOP/s")), (1.28e9, ("MFU", "25.0%"))]
)
def test_the_display_shows_the_share_of_the_peak_or_the_rate(peak, shown):
    header = replace(HEADER, flops=TrainingFlops(10**6, peak))
    display = Display(header, (0, 0), os.open(os.devnull, os.O_WRONLY))
    display.push(update_record(1))
    display.close()
    display._speed.clear()
    display._speed.extend([(10.0, 100), (12.0, 110)])  # 5 micro-steps of 64 tokens a second
    assert shown in display.status()
    assert ("grad norm", "0.75") in display.status()
