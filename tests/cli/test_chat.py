"""`onelaunch chat`: pipes, commands, a full context, and a terminal with ctrl-C."""

from __future__ import annotations

import contextlib
import io
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from onelaunch import api, checkpoints
from onelaunch.checkpoints.weights import LoadedModel
from onelaunch.config import ModelConfig
from onelaunch.errors import BadInput
from onelaunch.model import Model
from tests.generation.chat_templates import QWEN_2
from tests.tokenizer_files import (
    byte_names_by_value,
    json_tokenizer,
    small_model,
    token,
    write_json_tokenizer,
)

pytest.importorskip("jinja2")

EOS = 2
SECONDS = 120  # until something must have come, behind other work
PLAIN = ("--engine", "reference", "--device", "cpu", "--temperature", "0")


def write_model(folder: Path, chain: str, context: int = 1024, template: str | None = None) -> str:
    """A model that writes `chain` after its first character, and then EOS; after other characters
    "x". With the byte tokenizer."""
    config = ModelConfig(
        dim=264, n_layers=1, n_heads=2, hidden_dim=8, vocab_size=259, max_seq_len=context,
        tied_embeddings=False,
    )  # fmt: skip
    weights = Model(config).init_weights(0).state_dict()
    for name, weight in weights.items():
        if name.startswith("layers."):
            weight.zero_()
    ids = [3 + ord(character) for character in chain]
    following = dict.fromkeys(range(259), 3 + ord("x"))
    following |= dict(zip(ids, [*ids[1:], EOS], strict=True))
    weights["norm.weight"].fill_(1.0)
    weights["embed_tokens.weight"].copy_(torch.eye(259, 264))
    head = torch.zeros(259, 264)
    for before, after in following.items():
        head[after, before] = 1.0
    weights["lm_head.weight"].copy_(head)
    checkpoints.save(LoadedModel(config, weights, chat_template=template), folder, "hf")
    (folder / "tokenizer.bytes").write_text("bytes")
    return str(folder)


@pytest.fixture
def talk(onelaunch, monkeypatch):
    """Run a chat with lines on standard input; gives (code, standard output, standard error)."""

    def run(model: str, text: str | bytes, *argv: str):
        raw = text.encode() if isinstance(text, str) else text
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), "utf-8"))
        return onelaunch("chat", model, *PLAIN, *argv)

    return run


@pytest.fixture
def read(monkeypatch) -> list[list[tuple[str, str]]]:
    """The conversation that the model read for each answer, as (role, content)."""
    conversations = []
    decode_chat = api.LanguageModel.decode_chat

    def spy(self, messages, **options):
        conversations.append([(m["role"], m["content"]) for m in messages])
        return decode_chat(self, messages, **options)

    monkeypatch.setattr(api.LanguageModel, "decode_chat", spy)
    return conversations


def test_each_line_is_a_message_and_answers_alone_go_to_standard_output(tmp_path, talk, read):
    model = write_model(tmp_path / "model", "\nAnswer.")
    code, out, err = talk(model, "\ufeffhello\n\n   \n  what?  \r\nlast")
    assert (code, out) == (0, "Answer.\n" * 3)
    assert err == ("note: the model has no chat template; ChatML is used, which it may not know\n")
    assert read[0] == [("user", "hello")]
    assert read[2] == [
        ("user", "hello"), ("assistant", "Answer."), ("user", "what?"), ("assistant", "Answer."),
        ("user", "last"),
    ]  # fmt: skip
    assert talk(model, "")[:2] == (0, "")
    assert talk(model, "hi\n", "--quiet") == (0, "Answer.\n", "")


def test_commands(tmp_path, talk, read):
    model = write_model(tmp_path / "model", "\nAnswer.")
    code, out, err = talk(
        model,
        "one\n/system Be brief. \ntwo\n/reset\nthree\n/system\nfour\n/help\n /exit \n"
        "/exit\nnever\n",
        *("--system", "Hello."),
    )
    assert (code, out) == (0, "Answer.\n" * 5)
    assert read == [
        [("system", "Hello."), ("user", "one")],
        [("system", "Be brief."), ("user", "one"), ("assistant", "Answer."), ("user", "two")],
        [("system", "Be brief."), ("user", "three")],
        [("user", "three"), ("assistant", "Answer."), ("user", "four")],
        [
            ("user", "three"), ("assistant", "Answer."), ("user", "four"),
            ("assistant", "Answer."), ("user", "/exit"),
        ],
    ]  # fmt: skip
    for command in ("/system", "/reset", "/help", "/exit"):
        assert command in err


def test_an_answer_ends_at_the_templates_tag(tmp_path, talk):
    template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}<end>\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]\n{% endif %}"
    )
    model = write_model(tmp_path / "model", "\nOk <end>!", template=template)
    assert talk(model, "hi\n") == (0, "Ok \n", "")


def test_an_answer_ends_at_the_templates_special_token(tmp_path, talk):
    pytest.importorskip("tokenizers")
    end = "<|im_end|>"
    model = Path(write_model(tmp_path / "model", "\nOk\0x", template=QWEN_2))
    (model / "tokenizer.bytes").unlink()
    vocabulary = {f"<{i}>": i for i in range(3)}
    vocabulary |= {name: 3 + byte for byte, name in byte_names_by_value().items() if byte}
    tokenizer = json_tokenizer(added_tokens=[token(3, end)])
    tokenizer["model"]["vocab"] = vocabulary | {end: 3}
    write_json_tokenizer(model, tokenizer)
    assert talk(str(model), "hi\n") == (0, "Ok\n", "")
    model.joinpath("chat_template.jinja").write_text(QWEN_2.replace(end, ""))
    assert talk(str(model), "hi\n", "--max-new-tokens", "5")[:2] == (0, "Okx\n")


def test_a_full_context_drops_the_oldest_turns_and_says_so(tmp_path, talk, read):
    model = write_model(tmp_path / "model", "\nAnswer.", 256)
    code, out, err = talk(model, "aaaa\nbbbb\ncccc\ndddd\n", "--system", "S", "--quiet")
    assert (code, out, err) == (0, "Answer.\n" * 4, "")
    first, *later = [("user", "aaaa"), ("user", "bbbb"), ("user", "cccc"), ("user", "dddd")]
    assert read[0] == [("system", "S"), first]
    for before, message, conversation in zip([first, *later], later, read[1:], strict=False):
        assert conversation == [("system", "S"), before, ("assistant", "Answer."), message]
    err = talk(model, "aaaa\nbbbb\ncccc\n", "--system", "S")[2]
    assert err.splitlines()[1:] == ["the context of 256 tokens is full: dropped the oldest turn"]
    code, out, err = talk(model, "a" * 300)
    assert (code, out) == (2, "")
    assert "in the chat template" in err
    assert "the model's context holds 256" in err


def test_an_answer_that_is_cut_off_is_said_so(tmp_path, talk):
    model = write_model(tmp_path / "model", "\n", 128)
    template = "{{ messages[-1].content }}"
    (Path(model) / "chat_template.jinja").write_text(template)
    code, out, err = talk(model, "hey\n", "--max-new-tokens", "3")
    assert (code, out) == (0, "xxx\n")
    assert err == "the answer was cut off by --max-new-tokens\n"
    code, out, err = talk(model, "hey\n")
    assert set(out) == {"x", "\n"}
    assert err == "the answer was cut off by the model's context\n"


@pytest.mark.parametrize(
    ("text", "argv", "named"),
    [
        ("/nope\n", (), "/nope: no such command; /help"),
        (b"ok\ncaf\xe9\n", (), "standard input, line 2: not UTF-8"),
        ("hi\n", ("--temperature", "-1"), "--temperature -1.0: must be"),
        ("hi\n", ("--system", "x" * 300), "context holds 256"),
        ("hi\n", ("--tokenizer", "absent"), "absent: no such file"),
    ],
    ids=["command", "UTF-8", "temperature", "system", "tokenizer"],
)
def test_what_cannot_be_used_ends_a_piped_chat(tmp_path, talk, text, argv, named):
    code, _, err = talk(write_model(tmp_path / "model", "\nAnswer.", 256), text, *argv)
    assert code == 2
    assert err.splitlines()[-1].startswith("onelaunch: ")
    assert named in err


def test_a_model_without_a_tokenizer_and_a_broken_template_are_refused(tmp_path, talk):
    model = write_model(tmp_path / "model", "\nAnswer.", template="{% for %}")
    code, out, err = talk(model, "hi\n")
    assert (code, out) == (2, "")
    assert f"{model}: the chat template does not compile: line 1" in err
    (Path(model) / "chat_template.jinja").unlink()
    (Path(model) / "tokenizer.bytes").unlink()
    code, out, err = talk(model, "hi\n")
    assert (code, out) == (2, "")
    assert f"{model}: no tokenizer found for it; load it with --tokenizer FILE" in err


def test_without_jinja2_one_line_names_the_extra(tmp_path, talk, monkeypatch):
    model = write_model(tmp_path / "model", "\nAnswer.")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    code, out, err = talk(model, "hi\n")
    assert (code, out) == (2, "")
    assert "onelaunch[serve]" in err
    assert err.count("\n") == 1


def test_the_model_answers_in_python(tmp_path):
    model = api.load(write_model(tmp_path / "model", "\nAnswer."), engine="reference", device="cpu")
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    assert model.chat(messages, temperature=0) == "Answer."
    assert "".join(model.stream_chat(messages, temperature=0)) == "Answer."
    assert model.chat(messages, temperature=0, stop="we") == "Ans"
    assert model.chat(messages, temperature=0, stop_ids=[3 + ord("w")]) == "Ans"
    assert model.chat(messages, temperature=0, max_new_tokens=2) == "An"
    (completion,) = model.decode_chat(messages, temperature=0).finish()
    assert completion.finish == "stop"
    assert completion.prompt.ids[0] == 1
    with pytest.raises(BadInput, match="variables: 'messages'"):
        model.chat(messages, variables={"messages": []})
    with pytest.raises(TypeError, match="tempratur"):
        model.chat(messages, tempratur=0)


def test_two_bos_in_a_prompt_are_noted(tmp_path):
    pytest.importorskip("tokenizers")
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [256], "tokens": ["<s>"]}},
    }
    data = json_tokenizer(added_tokens=[token(256, "<s>")], post_processor=template)
    checkpoints.save(small_model(257), tmp_path / "model", "hf")
    write_json_tokenizer(tmp_path / "model", data)
    lines: list[str] = []
    model = api.load(tmp_path / "model", engine="reference", device="cpu", log=lines.append)
    model.generate(["a", "<s>b", " <s>"], max_new_tokens=1)
    assert lines == [
        "note: prompt 2 begins with <s>, and the tokenizer adds one: the model reads it twice"
    ]


class Terminal:
    """A chat in a terminal of its own."""

    def __init__(self, *argv: str, stdout: int | None = None) -> None:
        pty = pytest.importorskip("pty")
        self.descriptor, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", LEADER, "chat", *argv],
            stdin=theirs,
            stdout=theirs if stdout is None else stdout,
            stderr=theirs,
            start_new_session=True,
            env=os.environ | {"TERM": "dumb", "OMP_NUM_THREADS": "1"},
        )
        os.close(theirs)

    def until(self, text: str, seconds: float = SECONDS) -> str:
        """What comes, up to a text. Raises TimeoutError."""
        seen = b""
        while text.encode() not in seen:
            ready, _, _ = select.select([self.descriptor], [], [], seconds)
            if not ready:
                raise TimeoutError(f"{text!r} did not come after {seen!r}")
            try:
                raw = os.read(self.descriptor, 1)
            except OSError:  # Linux has this for the end
                raw = b""
            assert raw, f"{text!r} did not come before the end: {seen!r}"
            seen += raw
        return seen.decode(errors="replace").replace("\r\n", "\n")

    def write(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    def interrupt(self, awaited: str) -> str:
        """Press ctrl-C until a text comes: Python misses one that comes just before it waits for
        a key."""
        for _ in range(4):
            self.write("\x03")
            with contextlib.suppress(TimeoutError):
                return self.until(awaited, seconds=SECONDS / 4)
        raise TimeoutError(awaited)

    def leave(self) -> int:
        """Press ctrl-C until the program ends; the exit code."""
        for _ in range(40):
            self.write("\x03")
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self.process.wait(SECONDS / 40)
        raise TimeoutError("ctrl-C did not end the program")

    def end(self) -> int:
        """The exit code. What is still written is read, or the process would not end."""
        while True:
            try:
                if not os.read(self.descriptor, 4096):
                    break
            except OSError:
                break
        return self.process.wait(SECONDS)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.descriptor)


# the terminal becomes that of the session, so that ctrl-C reaches it
LEADER = """
import fcntl, termios, sys
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from onelaunch.cli import main
main(sys.argv[1:])
"""


@pytest.mark.extended
def test_a_terminal_with_commands_errors_and_history(tmp_path):
    model = write_model(tmp_path / "model", "\nAnswer.", 256)
    with Terminal(model, *PLAIN) as terminal:
        assert "/help lists commands" in terminal.until("> ")
        terminal.write("hello\r")
        assert terminal.until("> ") == "hello\nAnswer.\n> "
        terminal.write("/nope\r")
        assert "onelaunch: /nope: no such command" in terminal.until("> ")
        terminal.write("x" * 300 + "\r")
        assert "context holds 256" in terminal.until("> ")
        terminal.write("/reset\r")
        terminal.until("> ")
        terminal.write("half a li")
        terminal.until("half a li")
        terminal.interrupt("> ")  # the line is dropped, the program is there
        terminal.write("again\r")
        assert "Answer." in terminal.until("> ")
        terminal.write("\x04")
        assert terminal.end() == 0


def test_ctrl_c_ends_an_answer_and_then_the_program(tmp_path):
    model = write_model(tmp_path / "model", "\n", 1 << 14)
    (Path(model) / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    with Terminal(model, *PLAIN, "--max-new-tokens", "16000") as terminal:
        terminal.until("> ")
        terminal.write("hey\r")
        # what is not read fills the terminal, and the answer waits before its end
        terminal.until("xxx")
        terminal.interrupt("\n> ")
        assert terminal.process.poll() is None
        terminal.write("hey\r")
        terminal.until("xxx")
        terminal.interrupt("\n> ")
        assert terminal.leave() == 0


@pytest.mark.extended
def test_a_redirected_standard_output_has_answers_alone(tmp_path):
    model = write_model(tmp_path / "model", "\nAnswer.")
    with open(tmp_path / "out", "wb") as out:
        with Terminal(model, *PLAIN, stdout=out.fileno()) as terminal:
            terminal.until("> ")
            terminal.write("hello\r")
            terminal.until("> ")
            terminal.write("/exit\r")
            assert terminal.end() == 0
    assert (tmp_path / "out").read_text() == "Answer.\n"
