"""train and time-to-quality: what they time, on small stand-ins."""

from __future__ import annotations

import os
import re
import sys

import pytest

from onelaunch.bench.core.record import Row
from onelaunch.bench.core.rig import trainer as timed_trainer
from onelaunch.bench.engines import learning, time_to_quality, train
from onelaunch.errors import BadInput, RunFailed
from onelaunch.training.recipe import Recipe
from tests.bench.peers.test_nanogpt import nanogpt_checkout

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
        before = train._Peak(trainer.device)
        row = train._compare("tiny update", trainer, 3, print, before)
    made = row.to_dict()
    assert made["engine"] == "cpu"
    assert made["tokens"] == 64
    assert made["n"] == 3
    assert made["peers"].keys() == made["speedup"].keys() == {"eager"}
    assert made["parts"]["weight_gradient"] > 0
    assert "tiny update" in train.table(record([row]))


def test_micro_steps_of_an_update_beside_those_alone():
    recipe = Recipe().with_settings({**TINY, "train.accum": 3}, "test")
    with timed_trainer(recipe, "cpu") as trainer:
        row = train._accumulated("tiny micro-step of 3", trainer)
        assert all(p.grad is None for p in trainer.parameters.values())
    made = row.to_dict()
    assert made["micro_steps"] == 3
    assert made["accumulating"] > 0
    assert "tiny micro-step of 3" in train.table(record([row]))


@pytest.mark.usefixtures("compiled_training")
def test_loss_curves_of_the_engine_lie_on_those_of_pytorch(monkeypatch):
    monkeypatch.setattr(learning, "QUICK_UPDATES", 3)
    rows = learning.run("cpu", True, print)
    made = rows[0].to_dict()
    assert made["engine"] == "cpu"
    assert made["ours"] < 1e-4 < made["another_seed"]
    assert all(len(losses) == 3 for losses in made["losses"].values())
    assert "quickstart 3 updates" in learning.table(record(rows))
    assert learning.draw(record(rows)).axes


class TestTimeToQuality:
    @pytest.fixture
    def checkout(self, tmp_path):
        return nanogpt_checkout(tmp_path / "checkout", "abcabcabca" * 10)

    def seconds_to(self, lines, tmp_path):
        code = f"for line in {lines!r}: print(line)"
        line = re.compile(r"step (\d+): loss ([0-9.]+)")
        command = [sys.executable, "-c", code]
        contestant = time_to_quality.Contestant(command, tmp_path, os.environ, line)
        return time_to_quality._seconds_to(1.88, contestant)

    def test_one_that_fails_is_no_contestant(self, tmp_path):
        code = "print('step 1: loss 3.0'); raise SystemExit(3)"
        line = re.compile(r"step (\d+): loss ([0-9.]+)")
        contestant = time_to_quality.Contestant(
            [sys.executable, "-c", code], tmp_path, os.environ, line
        )
        with pytest.raises(RunFailed, match=r"with an error after a loss of 3\.0"):
            time_to_quality._seconds_to(1.88, contestant)

    def test_the_first_loss_that_is_low_enough(self, tmp_path):
        lines = ["step 1: loss 3.0", "step 2: loss 1.88", "step 3: loss 1.2"]
        took, update, loss = self.seconds_to(lines, tmp_path)
        assert (update, loss) == (2, 1.88)
        assert 0 < took < 60

    def test_one_that_never_gets_there_has_its_best(self, tmp_path):
        lines = ["step 1: loss 3.0", "step 2: loss 1.89", "step 3: loss 1.92"]
        assert self.seconds_to(lines, tmp_path)[1:] == (2, 1.89)
        with pytest.raises(RunFailed, match="nothing"):
            self.seconds_to(["nothing"], tmp_path)

    @pytest.mark.parametrize(
        ("line", "of"),
        [
            ("update 250: validation loss 1.9013", time_to_quality._OUR_LINE),
            ("step 250: train loss 1.8211, val loss 1.9013", time_to_quality._THEIR_LINE),
            ("step 250: train loss nan, val loss 1.9013", time_to_quality._THEIR_LINE),
        ],
    )
    def test_the_lines_of_evaluations(self, line, of):
        assert of.search(line).groups() == ("250", "1.9013")

    def test_what_it_wants(self, tmp_path):
        for device in ("cpu", "cuda"):
            with pytest.raises(BadInput, match="--peer nanogpt"):
                time_to_quality.run(device, True, print, {})
        with pytest.raises(BadInput, match=r"input\.txt"):
            time_to_quality.run("cpu", True, print, {"nanogpt": tmp_path})

    @pytest.fixture
    def commands(self, monkeypatch):
        """Those that would have been run: ours takes 1, 2, 3 s, nanoGPT 10 s."""
        commands, seconds = [], iter((1.0, 2.0, 3.0))

        def reached(target, contestant):
            commands.append(contestant.command)
            ours = "train" in contestant.command
            took = next(seconds) if ours else 10.0
            return time_to_quality.Reached(took, 500, target if ours else target + 0.01)

        monkeypatch.setattr(time_to_quality, "_seconds_to", reached)
        monkeypatch.setattr(time_to_quality, "_prepare_ours", lambda text, folder: "DATA")
        return commands

    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    def test_rounds_alternate_on_the_budget_of_the_device(self, device, checkout, commands):
        (row,) = time_to_quality.run(device, False, lambda line: None, {"nanogpt": checkout})
        budget = time_to_quality.CPU if device == "cpu" else time_to_quality.GPU
        ours = ["train" in command for command in commands]
        assert ours == [True, False, False, True, True, False]
        for command, is_ours in zip(commands, ours, strict=True):
            if is_ours:
                assert command[command.index("train") + 1] == budget.recipe
                assert command[command.index("--device") + 1] == device
                assert f"eval.batches={budget.eval_batches}" in command
            else:
                assert command[1:] == [
                    "train.py", "config/train_shakespeare_char.py", *budget.options,
                    f"--device={device}",
                ]  # fmt: skip
        made = row.to_dict()
        assert made["case"] == f"{budget.recipe} to {budget.target}"
        assert (made["ours"], made["first"], made["peers"]) == (2.0, 1.0, {"nanogpt": 10.0})
        assert made["updates"] == {"ours": [500] * 3, "nanogpt": [500] * 3}
        assert made["ratio"] == pytest.approx(0.2)

    def test_its_table(self):
        reached = time_to_quality.Reached
        row = time_to_quality._row(
            time_to_quality.GPU,
            {
                "ours": [reached(9.0, 750, 1.46), reached(5.0, 750, 1.45)],
                "nanogpt": [reached(20.0, 1000, 1.48), reached(10.0, 1000, 1.47)],
            },
        )
        assert isinstance(row, Row)
        assert row.notes["ratio"] == pytest.approx(0.475)
        text = time_to_quality.table(record([row]))
        assert "0.47" in text or "0.48" in text
        assert "1.4600, 1.4500" in text

    def test_a_record_without_the_peers_first_round_has_a_table_too(self):
        row = time_to_quality._row(
            time_to_quality.CPU,
            {who: [time_to_quality.Reached(9.0, 750, 1.8)] for who in ("ours", "nanogpt")},
        )
        del row.notes["peers_first"], row.notes["updates"]
        assert "| shakespeare-char to 1.88 |" in time_to_quality.table(record([row]))
