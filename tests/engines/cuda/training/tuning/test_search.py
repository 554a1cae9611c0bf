"""The walk through the forms of a training step, with times that are made up."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from onelaunch.config import preset
from onelaunch.engines.cuda.training.forms import (
    FEW_ROWS,
    FEW_ROWS_BACK,
    MANY_ROWS,
    TrainingForms,
    rule,
)
from onelaunch.engines.cuda.training.tuning.candidates import candidates
from onelaunch.engines.cuda.training.tuning.search import (
    MARGIN,
    Comparison,
    comparison_of,
    search,
    shown,
)
from onelaunch.errors import RunFailed

CONFIG = preset("stories15m")
RULE = rule(CONFIG, 64, 256, torch.bfloat16, fuses=True)
CANDIDATES = candidates(CONFIG, 64, 256, torch.bfloat16, fuses=True)


@pytest.mark.parametrize("fuses", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["stories15m", "stories110m", "smollm2-135m", "qwen3-0.6b"])
@pytest.mark.parametrize(("sequences", "length"), [(1, 7), (1, 256), (12, 1024), (64, 256)])
def test_candidates_begin_with_the_rules(name, sequences, length, dtype, fuses):
    config = preset(name)
    by_rule = rule(config, sequences, length, dtype, fuses)
    values = candidates(config, sequences, length, dtype, fuses)
    assert values.keys() <= {field.name for field in fields(TrainingForms)}
    assert ("attention_forward" in values) == (by_rule.attention_forward is not None)
    assert ("swiglu_forward" in values) == ("swiglu_backward" in values) == fuses
    for form, of_form in values.items():
        assert of_form[0] == getattr(by_rule, form)
        assert len(of_form) == len(set(of_form)) <= 7
        for blocks in of_form if form.startswith("attention") else ():
            assert 16 <= blocks.rows <= max(16, 2 * length)
            assert 16 <= blocks.columns <= max(16, 2 * length)


def test_candidates_by_how_much_there_is():
    assert CANDIDATES == {
        "swiglu_forward": [MANY_ROWS, FEW_ROWS, None],
        "swiglu_backward": [None, FEW_ROWS_BACK],
        "attention_forward": [(64, 64, 2, 4), (64, 64, 3, 4), (64, 32, 3, 4), (128, 64, 3, 8)],
        "attention_backward": [(64, 32, 3, 4), (64, 64, 2, 4), (64, 32, 2, 4)],
        "logits": [1 << 29, 1 << 27, 1 << 28],
        "side_stream": [True, False],
    }
    few = candidates(CONFIG, 1, 256, torch.bfloat16, fuses=True)
    assert {(32, 64, 2, 4), (16, 128, 2, 4)} <= set(few["attention_forward"])
    assert {(32, 32, 2, 4), (16, 128, 2, 4)} <= set(few["attention_backward"])
    assert few["logits"] == [1 << 29]


def times(gains):
    """A comparison by what forms take: 1,000 us less `gains` of each value that they have."""
    compared = []

    def us(forms):
        return 1000.0 - sum(gains.get((field.name, getattr(forms, field.name)), 0) for field in
                            fields(forms))  # fmt: skip

    def compare(best, candidate):
        compared.append((best, candidate))
        before, now = us(best), us(candidate)
        return Comparison(before, now, 1 - now / before, 0.0)

    return compare, compared


def no_progress(phase, done, total):
    pass


def test_one_form_after_another_becomes_the_fastest():
    gains = {
        ("swiglu_forward", FEW_ROWS): 20.0, ("swiglu_forward", None): 50.0,
        ("attention_backward", (64, 64, 2, 4)): 30.0, ("logits", 1 << 28): 5.0,
        ("side_stream", False): -90.0,
    }  # fmt: skip
    compare, compared = times(gains)
    heard = []
    found = search(RULE, CANDIDATES, compare, lambda *at: heard.append(at))
    blocks = CANDIDATES["attention_backward"][1]
    assert found.forms == replace(RULE, swiglu_forward=None, attention_backward=blocks)
    assert (found.us, found.rule_us) == (920.0, 1000.0)
    assert compared[-1] == (RULE, found.forms)
    # one form differs from the best at a time
    for best, candidate in compared[:-1]:
        assert sum(getattr(best, f.name) != getattr(candidate, f.name) for f in fields(RULE)) == 1
    timed = [(each.form, each.value, each.us) for each in found.timed]
    assert timed[:3] == [
        ("swiglu_forward", MANY_ROWS, 1000.0), ("swiglu_forward", FEW_ROWS, 980.0),
        ("swiglu_forward", None, 950.0),
    ]  # fmt: skip
    assert timed[-2:] == [("side_stream", True, 920.0), ("side_stream", False, 1010.0)]
    total = len(compared)
    assert [(done, of) for _, done, of in heard] == [(i + 1, total) for i in range(total)]


def test_what_does_not_run_is_left_out_with_the_reason():
    compare, _ = times({})

    def some(best, candidate):
        if candidate.swiglu_forward == FEW_ROWS:
            return "OutOfResources: shared memory"
        return compare(best, candidate)

    found = search(RULE, CANDIDATES, some, no_progress)
    assert found.forms == RULE
    failed = [each for each in found.timed if each.us is None]
    assert failed == [("swiglu_forward", FEW_ROWS, None, "OutOfResources: shared memory")]
    found = search(
        RULE, {"side_stream": [True, False]}, lambda *_: compare(RULE, RULE), no_progress
    )
    assert found.forms == RULE
    with pytest.raises(RunFailed, match="gone"):
        search(RULE, {}, lambda *_: "gone", no_progress)


def test_forms_that_are_not_faster_in_the_end_are_not_chosen():
    gains = {("swiglu_forward", None): 50.0}
    compare, compared = times(gains)

    def noisy(best, candidate):
        if compared:
            return Comparison(1000.0, 995.0, 0.005, 0.0)
        return compare(best, candidate)

    found = search(RULE, {"swiglu_forward": [MANY_ROWS, None]}, noisy, no_progress)
    assert found.forms == RULE
    assert found.us == found.rule_us == 1000.0


def test_a_gain_within_the_noise_does_not_count():
    assert Comparison(100.0, 98.0, 0.02, 0.005).wins
    assert not Comparison(100.0, 98.0, 0.02, 0.011).wins
    assert not Comparison(100.0, 99.0, MARGIN, 0.0).wins
    steady = comparison_of([(100.0, 95.0)] * 5)
    assert steady == (100.0, 95.0, pytest.approx(0.05), 0.0)
    # both slow down together: their ratio does not
    drifting = comparison_of([(100.0 * k, 95.0 * k) for k in (1, 2, 3, 4, 5)])
    assert drifting.wins
    assert drifting.noise == pytest.approx(0.0)
    shaky = comparison_of([(100.0, us) for us in (90.0, 96.0, 95.0, 101.0, 94.0)])
    assert (shaky.us, shaky.noise) == (95.0, pytest.approx(0.01))


def test_values_are_shown_in_a_few_characters():
    shown_values = [shown(value) for values in CANDIDATES.values() for value in values]
    assert shown_values[:4] == [
        "128x128x64, 4 stages, 8 warps", "64x32x64, 5 stages, 4 warps", "library", "library",
    ]  # fmt: skip
    assert "64x32, 3 stages, 4 warps" in shown_values
    assert shown_values[-5:] == ["536,870,912", "134,217,728", "268,435,456", "on", "off"]
