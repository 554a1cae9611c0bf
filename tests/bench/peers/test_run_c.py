"""run.c as a peer, played by a stand-in that reads the files and options of its command line."""

import os
import stat
import sys

import pytest

from onelaunch.bench.peers.run_c import BOS, LETTERS, SPACE, RunC, write_tokenizer
from onelaunch.errors import BadInput, RunFailed

PROMPT = [BOS, SPACE, LETTERS[0], LETTERS[30]]
VOCAB = 300

# Encodes and writes as run.c does, then "draws" 200, 201 ...; what it was called with goes to a
# file next to it.
STAND_IN = f"""#!{sys.executable}
import os, struct, sys
options = dict(zip(sys.argv[2::2], sys.argv[3::2]))
with open(options["-z"], "rb") as file:
    (longest,) = struct.unpack("<i", file.read(4))
    pieces = []
    while head := file.read(8):
        pieces.append(file.read(struct.unpack("<fi", head)[1]))
assert longest >= max(map(len, pieces))
ids = [1, pieces.index(b" ")]
for letter in options["-i"].encode():
    assert bytes([letter]) not in pieces
    ids.append(letter + 3)
steps = int(options["-n"])
drawn = DRAWN
while len(ids) <= steps and drawn:
    ids.append(drawn.pop(0))
drawn_ids = ids[1 : steps + 1]
sys.stdout.buffer.write(b"".join(pieces[i] for i in drawn_ids[1:]) + b"\\n")
with open(sys.argv[0] + ".said", "w") as file:
    print(options["-t"], os.environ["OMP_NUM_THREADS"], ids[:4], sys.argv[1], file=file)
SAY
"""


@pytest.fixture
def program(tmp_path):
    def make(drawn="list(range(200, 290))", say="print('achieved tok/s: 123.5', file=sys.stderr)"):
        binary = tmp_path / "run"
        binary.write_text(STAND_IN.replace("DRAWN", drawn).replace("SAY", say))
        binary.chmod(binary.stat().st_mode | stat.S_IXUSR)
        return RunC(binary, tmp_path / "model.bin", VOCAB, 64)

    return make


def test_rate_and_tokens_come_back(program, tmp_path):
    rate, new = program().generate(PROMPT, 5, threads=3)
    assert rate == 123.5
    assert new == [200, 201, 202, 203, 204]
    said = (tmp_path / "run.said").read_text()
    assert said == f"0 3 {PROMPT} {tmp_path / 'model.bin'}\n"


def test_a_space_that_it_draws_is_a_token(program):
    drawn = f"[200, {SPACE}, 201]"
    assert program(drawn).generate(PROMPT, 3, 1)[1] == [200, SPACE, 201]


def test_the_context_can_be_full_but_no_fuller(program):
    peer = program()
    most = 64 - len(PROMPT) + 1
    assert len(peer.generate(PROMPT, most, 1)[1]) == most
    with pytest.raises(BadInput, match="do not fit"):
        peer.generate(PROMPT, most + 1, 1)


@pytest.mark.parametrize(
    ("made", "log"),
    [
        ({"drawn": "[200, 201]"}, "stopped after 2 of 5"),
        ({"drawn": "[]"}, "stopped after 0 of 5"),
        ({"say": "pass"}, "no rate"),
        ({"say": "print('achieved tok/s: inf', file=sys.stderr)"}, "no rate"),
        ({"say": "print('achieved tok/s: 0.000', file=sys.stderr)"}, "no rate"),
        ({"say": "sys.exit('malloc failed!')"}, "exit status 1.*malloc failed!"),
    ],
)
def test_a_sample_of_other_work_is_refused(program, made, log):
    with pytest.raises(RunFailed, match=log):
        program(**made).generate(PROMPT, 5, 1)


def test_one_that_does_not_end_is_stopped(program):
    with pytest.raises(RunFailed, match="longer than 0.3 s"):
        program(say="import time; time.sleep(60)").generate(PROMPT, 5, 1, seconds=0.3)


@pytest.mark.parametrize("prompt", [[], [BOS, SPACE], [BOS, 40, 40], [BOS, SPACE, 290], [1, 3, 1]])
def test_prompts_that_it_would_read_otherwise_are_refused(program, prompt):
    with pytest.raises(BadInput, match="prompt"):
        program().generate(prompt, 5, 1)


def test_paths_of_no_program(tmp_path):
    with pytest.raises(BadInput, match="no such file"):
        RunC(tmp_path / "absent", tmp_path / "model.bin", VOCAB, 64)
    plain = tmp_path / "plain"
    plain.write_text("")
    plain.chmod(0o600)
    if os.access(plain, os.X_OK):
        pytest.skip("every file can be run here")
    with pytest.raises(BadInput, match="chmod"):
        RunC(plain, tmp_path / "model.bin", VOCAB, 64)


@pytest.mark.parametrize("vocab_size", [300, 32000])
def test_the_tokenizer_s_size_is_that_of_its_pieces(tmp_path, vocab_size):
    write_tokenizer(tmp_path / "tokenizer.bin", vocab_size)
    every = 4 + 4 + 6  # score, length, digits; one piece is a space
    assert (tmp_path / "tokenizer.bin").stat().st_size == 4 + vocab_size * every - 5
