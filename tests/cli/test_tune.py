"""`onelaunch tune`, with an engine that is made up: a GPU's own tests are in tests/gpu."""

import json

import pytest

from onelaunch import api

FOUND = {
    "batch": 2, "sequence": 64, "form": "staged", "tried": 90, "seconds": 21.4,
    "us": {"staged": 105.41, "rule": 107.77, "all": 121.49},
}  # fmt: skip


@pytest.fixture
def tuned(monkeypatch):
    asked = []

    def tune(self, batch, sequence, *, progress):
        progress("timing tiles", 3, 90)
        asked.append((self._how["device"], self._how["dtype"], batch, sequence))
        return FOUND

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
