"""What a newcomer meets at the command line beyond its errors."""

import logging
import sys

import pytest

from onelaunch.cli.output import Output
from onelaunch.generation.decode import Completion, TextEvent
from onelaunch.generation.prompts import Prompt


def test_help_names_what_an_option_takes(onelaunch):
    """Not its type."""
    for verb in (
        "prepare", "train", "eval", "generate", "tune", "export", "inspect", "bench", "report",
    ):  # fmt: skip
        out = onelaunch(verb, "--help")[1]
        options = out.partition("Options:")[2]
        for kind in ("<str>", "<int>", "<float>", "<path>"):
            assert kind not in options, f"{verb}: {kind}"
        assert "[[" not in out


def test_every_summary_in_the_list_of_verbs_is_whole(onelaunch, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert "..." not in onelaunch("--help")[1].partition("Commands:")[2]


def test_random_of_a_file_says_to_leave_it_out(onelaunch, tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(b"")
    code, _, err = onelaunch("generate", str(path), "--random")
    assert code == 2
    assert err.startswith(f"onelaunch: {path}: --random is for presets")
    assert "stories260k" in err
    assert "leave it out" in err


class Broken:
    """A decoding that is broken off after a first token, or before it."""

    def __init__(self, *events):
        self.completions = [Completion(Prompt("Oh", [1, 5], 1))]
        self._events = events

    def __iter__(self):
        yield from self._events
        raise KeyboardInterrupt


@pytest.mark.parametrize(("terminal", "ended"), [(True, "Oh upon\n"), (False, "Oh upon")])
def test_a_text_that_is_broken_off_ends_its_line_on_a_terminal(
    monkeypatch, capsys, terminal, ended
):
    """What the shell or an error prints next would go on in it."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    for events, written in (((), ""), ((TextEvent(0, 5, " upon", None),), ended)):
        with pytest.raises(KeyboardInterrupt):
            Output(echo=True, ids=False, quiet=False).write(Broken(*events))
        assert capsys.readouterr().out == written


def test_generate_ends_the_line_when_it_is_interrupted(onelaunch, monkeypatch):
    """Ctrl-C amid a text; the exit code is that of the signal."""
    monkeypatch.setattr(
        "onelaunch.api.LanguageModel.decode",
        lambda self, prompt, **how: Broken(TextEvent(0, 7, "", None)),
    )
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    argv = ("generate", "stories260k", "--random", "--ids", "--engine", "reference")
    assert onelaunch(*argv) == (130, "5 7\n", "")


def test_matplotlib_is_quiet_about_its_folders():
    pytest.importorskip("matplotlib")
    from onelaunch.bench.core.plots import new_figure

    new_figure(1, 1)
    assert not logging.getLogger("matplotlib").isEnabledFor(logging.WARNING)
