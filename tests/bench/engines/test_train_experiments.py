"""train and time-to-quality: what they time, on small stand-ins."""

from __future__ import annotations

import os
import pickle
import re
import sys

import numpy as np
import pytest

from onelaunch.bench.core.record import Row
from onelaunch.bench.core.rig import trainer as timed_trainer
from onelaunch.bench.engines import time_to_quality, train
from onelaunch.errors import BadInput, RunFailed
from onelaunch.training.recipe import Recipe

TINY = {
    "model.dim": 32, "model.n_layers": 1, "model.n_heads": 2, "model.hidden_dim": 48,
    "model.max_seq_len": 32, "train.batch_size": 2, "train.updates": 10**6,
}  # fmt: skip


def record(rows):
    return {"experiment": "x", "device": "D", "date": "d", "commit": "c", "versions": {},
            "unit": "ms", "rows": [row.to_dict() for row in rows]}  # fmt: skip


@pytest.mark.usefixtures("compiled_training")
def test_updates_of_the_engine_that_auto_takes_and_of_a_loop(monkeypatch):
    monkeypatch.setattr(train, "LOOPS", ("eager",))
    monkeypatch.setattr(train, "SAMPLE_SECONDS", 0.0)
    recipe = Recipe().with_settings(TINY, "test")
    with timed_trainer(recipe, "cpu", engine="auto") as trainer:
        row = train._compare("tiny update", trainer, 3, print)
    made = row.to_dict()
    assert made["engine"] == "cpu"
    assert made["tokens"] == 64
    assert made["n"] == 3
    assert made["peers"].keys() == made["speedup"].keys() == {"eager"}
    assert made["parts"]["weight_gradient"] > 0
    assert "tiny update" in train.table(record([row]))


class TestTimeToQuality:
    @pytest.fixture
    def checkout(self, tmp_path):
        source = tmp_path / "checkout"
        (source / "config").mkdir(parents=True)
        for name in ("train.py", "model.py", "configurator.py"):
            (source / name).write_text(name)
        (source / "config/train_shakespeare_char.py").write_text("flags")
        text = source / time_to_quality.TEXT
        text.parent.mkdir(parents=True)
        text.write_text("abcabcabca" * 10)
        return source

    def test_its_text_is_split_and_numbered(self, checkout, tmp_path):
        command = time_to_quality._prepare_theirs(checkout, tmp_path)
        assert command[1:3] == ["train.py", "config/train_shakespeare_char.py"]
        data = tmp_path / time_to_quality.NANOGPT / time_to_quality.TEXT.parent
        meta = pickle.loads((data / "meta.pkl").read_bytes())
        assert meta["vocab_size"] == 3
        assert meta["itos"][meta["stoi"]["b"]] == "b"
        ids = np.concatenate([np.fromfile(data / f"{n}.bin", np.uint16) for n in ("train", "val")])
        assert len(np.fromfile(data / "val.bin", np.uint16)) == 10
        assert "".join(meta["itos"][i] for i in ids) == "abcabcabca" * 10

    def seconds_to(self, lines, tmp_path):
        code = f"for line in {lines!r}: print(line)"
        pattern = re.compile(r"loss ([0-9.]+)")
        command = [sys.executable, "-c", code]
        return time_to_quality._seconds_to(command, pattern, tmp_path, os.environ)

    def test_the_first_loss_that_is_low_enough(self, tmp_path):
        took, loss = self.seconds_to(["loss 3.0", "loss 1.88", "loss 1.2"], tmp_path)
        assert loss == 1.88
        assert 0 < took < 60

    def test_one_that_never_gets_there_takes_all_its_time(self, tmp_path):
        assert self.seconds_to(["loss 3.0", "loss 1.89"], tmp_path)[1] == 1.89
        with pytest.raises(RunFailed, match="nothing"):
            self.seconds_to(["nothing"], tmp_path)

    def test_what_it_wants_and_shows(self, tmp_path):
        with pytest.raises(BadInput, match="--peer nanogpt"):
            time_to_quality.run("cpu", True, print, {})
        with pytest.raises(BadInput, match="input.txt"):
            time_to_quality.run("cpu", True, print, {"nanogpt": tmp_path})
        row = time_to_quality._row(
            {"ours": [9.0, 5.0], "nanogpt": [20.0, 10.0]}, {"ours": [1.8], "nanogpt": [1.9]}
        )
        assert isinstance(row, Row)
        assert row.notes["ratio"] == pytest.approx(0.475)
        text = time_to_quality.table(record([row]))
        assert "0.47" in text or "0.48" in text
