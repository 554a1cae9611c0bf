"""`onelaunch tune`, with an engine that is made up: a GPU's own tests are in tests/gpu."""

import json

import pytest

from onelaunch import api

FOUND = {
    "batch": 2, "sequence": 64, "form": "staged", "tried": 90, "seconds": 21.4,
    "us": {"staged": 105.41, "rule": 107.77, "all": 121.49},
}  # fmt: skip
OF_TRAINING = {
    "batch": 64, "sequence": 256, "forms": {}, "us": 7900.5, "rule_us": 8123.4, "tried": 5,
    "seconds": 61.2, "kept": True,
    "timed": [
        {"form": "attention_forward", "value": "64x64, 2 stages, 4 warps", "us": 8123.4,
         "why": None, "chosen": False},
        {"form": "attention_forward", "value": "64x32, 3 stages, 4 warps", "us": 7900.5,
         "why": None, "chosen": True},
        {"form": "attention_forward", "value": "128x64, 3 stages, 8 warps", "us": None,
         "why": "OutOfResources: shared memory", "chosen": False},
        {"form": "side_stream", "value": "on", "us": 7901.0, "why": None, "chosen": True},
        {"form": "side_stream", "value": "off", "us": 8200.0, "why": None, "chosen": False},
    ],
}  # fmt: skip


@pytest.fixture
def tuned(monkeypatch):
    asked = []

    def tune(self, batch, sequence, *, training, progress):
        progress("timing tiles", 3, 90)
        asked.append((self._how["device"], self._how["dtype"], batch, sequence))
        return OF_TRAINING if training else FOUND

    monkeypatch.setattr(api.LanguageModel, "tune", tune)
    return asked


def test_each_form_and_the_chosen_one(onelaunch, tuned):
    argv = ("tune", "stories260k", "--random", "--batch", 2, "--seq", 50, "--dtype", "float16")
    code, out, err = onelaunch(*argv)
    assert code == 0, err
    assert tuned == [("auto", "float16", 2, 50)]
    lines = [line.split() for line in out.splitlines()]
    assert lines == [
        ["staged", "105.4", "us", "chosen"], ["rule", "107.8", "us"], ["all", "121.5", "us"],
    ]  # fmt: skip
    assert "2x64" in err
    assert "21 s" in err
    assert "\r" not in err, "no progress where nobody looks"


def test_json(onelaunch, tuned):
    code, out, err = onelaunch("tune", "stories260k", "--random", "--json", "--quiet")
    assert (code, json.loads(out), err) == (0, FOUND, "")
    assert tuned == [("auto", None, 1, None)]


def test_each_value_of_a_training_step_and_the_chosen_ones(onelaunch, tuned):
    code, out, err = onelaunch("tune", "stories260k", "--random", "--training", "64x256")
    assert code == 0, err
    assert tuned == [("auto", None, 64, 256)]
    assert out.splitlines() == [
        "attention forward  64x64, 2 stages, 4 warps      8123.4 us",
        "attention forward  64x32, 3 stages, 4 warps      7900.5 us  chosen",
        "attention forward  128x64, 3 stages, 8 warps  does not run: OutOfResources: shared memory",
        "side stream        on                            7901.0 us  chosen",
        "side stream        off                           8200.0 us",
    ]
    assert "64x256 tokens: 7900.5 us a micro-step, 8123.4 by the rule; 5 timed in 61 s" in err
    argv = ("tune", "stories260k", "--random", "--training", "8x32", "--json", "--quiet")
    code, out, err = onelaunch(*argv)
    assert (code, json.loads(out), err) == (0, OF_TRAINING, "")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--training", "64"), "must be as 64x256"), (("--training", "64x"), "must be as 64x256"),
        (("--training", "64x256", "--batch", "1"), "leave out --batch"),
        (("--training", "64x256", "--seq", "9"), "leave out --batch"),
        (("--training", "64x256", "--device", "cpu"), "only the CUDA engine can be tuned"),
    ],
)  # fmt: skip
def test_a_training_step_that_cannot_be_tuned(onelaunch, argv, words):
    code, out, err = onelaunch("tune", "stories260k", "--random", *argv)
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1


def test_a_device_without_anything_to_tune_is_said(onelaunch):
    code, out, err = onelaunch("tune", "stories260k", "--random", "--device", "cpu")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "cpu" in err


@pytest.mark.parametrize("argv", [("--batch", "0"), ("--seq", "-1"), ("--dtype", "int8")])
def test_wrong_arguments_are_named(onelaunch, argv):
    code, _, err = onelaunch("tune", "stories260k", "--random", *argv)
    assert code == 2
    assert err.count("\n") == 1
