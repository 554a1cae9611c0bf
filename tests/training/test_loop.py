"""The loop: what it computes, exact resume, accumulation, stops, and what ends it badly."""

import errno
import json
import math
import os
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from onelaunch.checkpoints import run_folder, tensors
from onelaunch.checkpoints.run_folder import (
    best_checkpoint,
    list_checkpoints,
    newest_valid_checkpoint,
    read_state,
)
from onelaunch.errors import BadInput, RunFailed
from onelaunch.model import Model
from onelaunch.training import loop, state
from onelaunch.training import run as runs
from onelaunch.training.clock import PARTS
from onelaunch.training.data import open_data
from onelaunch.training.loop import Trainer
from onelaunch.training.recipe import Recipe
from tests.kills import SETTINGS, outcome
from tests.metrics import read_metrics


def recipe(**changed) -> Recipe:
    settings = SETTINGS | {"train.updates": 6, "train.accum": 3, "eval.every": 2}
    settings |= {"checkpoint.every": 2}
    settings |= {key.replace("__", "."): value for key, value in changed.items()}
    return Recipe().with_settings(settings, "test")


def updates(run):
    return [r for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "update"]


@pytest.fixture
def stop_after(monkeypatch):
    """Ask for a stop by a real signal while the n-th micro-step runs."""
    micro_step = Trainer._micro_step

    def arrange(n: int, number: int = signal.SIGTERM) -> None:
        count = 0

        def counted(self):
            nonlocal count
            count += 1
            if count == n:
                os.kill(os.getpid(), number)
            micro_step(self)

        monkeypatch.setattr(Trainer, "_micro_step", counted)

    return arrange


def test_losses_equal_a_plain_loop(tmp_path):
    """The same batches through a loop written out here: AdamW, clipping, averaging, schedule."""
    r = recipe(train__dropout=0.0, eval__every=0)
    runs.start(r, tmp_path / "run", quiet=True)
    data = open_data("stories", r.train.seed)
    sampler = data.train(32, r.train.seed)
    model = Model(r.model_config(512)).init_weights(r.train.seed)
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for p in named.values() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in named.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    for record in updates(tmp_path / "run"):
        losses = []
        for _ in range(3):
            tokens, targets = (torch.from_numpy(a) for a in sampler.next(4))
            logits = model(tokens)
            loss = F.cross_entropy(logits.view(-1, 512), targets.view(-1))
            (loss / 3).backward()
            losses.append(loss.item())
        norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in named.values()]))
        for p in named.values():
            p.grad *= min(1.0, 1.0 / norm.item())
        for group in optimizer.param_groups:
            group["lr"] = r.learning_rate(record["update"] - 1)
        optimizer.step()
        optimizer.zero_grad()
        assert record["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
        assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert record["lr"] == r.learning_rate(record["update"] - 1)
    assert len(updates(tmp_path / "run")) == 6


def test_accumulation_equals_one_large_batch(tmp_path):
    """Four micro-steps of 2 sequences are one of 8, up to rounding."""
    small = recipe(train__accum=4, train__batch_size=2, train__dropout=0.0, train__updates=4)
    large = recipe(train__accum=1, train__batch_size=8, train__dropout=0.0, train__updates=4)
    runs.start(small, tmp_path / "small", quiet=True)
    runs.start(large, tmp_path / "large", quiet=True)
    for a, b in zip(updates(tmp_path / "small"), updates(tmp_path / "large"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["tokens"] == b["tokens"] == a["update"] * 8 * 32
        assert (a["micro_steps"], b["micro_steps"]) == (4, 1)


@pytest.mark.parametrize("micro_step", [1, 2, 3, 7, 8, 12])
def test_resume_is_exact_wherever_it_stopped(tmp_path, stop_after, micro_step, monkeypatch):
    r = recipe()
    runs.start(r, tmp_path / "whole", quiet=True)
    stop_after(micro_step)
    stopped = runs.start(r, tmp_path / "cut", quiet=True)
    assert stopped.signal == signal.SIGTERM
    assert stopped.progress.update == micro_step // 3
    assert stopped.progress.micro == micro_step % 3
    has_gradients = (
        "gradients.safetensors" in read_state(list_checkpoints(tmp_path / "cut")[-1])["sha256"]
    )
    assert has_gradients == bool(micro_step % 3)
    monkeypatch.undo()
    torch.manual_seed(0)  # a resume must not depend on what was drawn before it
    runs.resume(tmp_path / "cut", {}, quiet=True)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def test_a_stop_during_evaluation_is_made_up_for(tmp_path, monkeypatch):
    r = recipe()
    runs.start(r, tmp_path / "whole", quiet=True)
    evaluate = Trainer._evaluate

    def interrupted(self, *args):
        os.kill(os.getpid(), signal.SIGINT)
        return evaluate(self, *args)

    monkeypatch.setattr(Trainer, "_evaluate", interrupted)
    stopped = runs.start(r, tmp_path / "cut", quiet=True)
    assert (stopped.signal, stopped.progress.evaluated) == (signal.SIGINT, 0)
    monkeypatch.undo()
    runs.resume(tmp_path / "cut", {}, quiet=True)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
    assert best_checkpoint(tmp_path / "cut").name == best_checkpoint(tmp_path / "whole").name


def test_a_finished_run_can_be_extended(tmp_path):
    runs.start(recipe(), tmp_path / "run", quiet=True)
    done = runs.resume(tmp_path / "run", {"train.updates": 8}, quiet=True)
    assert done.progress.update == 8
    assert [r["update"] for r in updates(tmp_path / "run")] == list(range(1, 9))
    assert Recipe.load(str(tmp_path / "run" / "recipe.toml")).train.updates == 8
    again = runs.resume(tmp_path / "run", {}, quiet=True)
    assert again.progress.update == 8


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path):
    r = recipe()
    runs.start(r, tmp_path / "whole", quiet=True)
    runs.start(r, tmp_path / "cut", quiet=True)
    newest = list_checkpoints(tmp_path / "cut")[-1]
    damaged = bytearray((newest / "optimizer.safetensors").read_bytes())
    damaged[-5] ^= 1
    (newest / "optimizer.safetensors").write_bytes(damaged)
    assert newest_valid_checkpoint(tmp_path / "cut")[0] == list_checkpoints(tmp_path / "cut")[-2]
    runs.resume(tmp_path / "cut", {}, quiet=True)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def test_a_run_killed_before_its_first_checkpoint_begins_again(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*args):
        raise Killed

    r = recipe()
    runs.start(r, tmp_path / "whole", quiet=True)
    monkeypatch.setattr("onelaunch.training.state.save", killed)
    with pytest.raises(Killed):
        runs.start(r, tmp_path / "cut", quiet=True)
    monkeypatch.undo()
    assert updates(tmp_path / "cut") != []
    torch.manual_seed(0)
    runs.resume(tmp_path / "cut", {}, quiet=True)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
    assert [u["update"] for u in updates(tmp_path / "cut")] == list(range(1, 7))


def test_a_kill_between_the_best_checkpoint_and_its_mark_is_made_up_for(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*args):
        raise Killed

    monkeypatch.setattr("onelaunch.training.loop.set_best", killed)
    with pytest.raises(Killed):
        runs.start(recipe(), tmp_path / "run", quiet=True)
    monkeypatch.undo()
    assert best_checkpoint(tmp_path / "run") is None
    monkeypatch.setattr(Trainer, "_update", killed)
    with pytest.raises(Killed):
        runs.resume(tmp_path / "run", {}, quiet=True)
    assert best_checkpoint(tmp_path / "run").name == "update-00000002"


def test_checkpoints_kept_are_the_newest_and_the_best(tmp_path, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 2.6, 2.7, 2.8])
    evaluate = runs_evaluate()

    def scripted(*args, **kwargs):
        result = evaluate(*args, **kwargs)
        return type(result)(next(losses), result.tokens)

    monkeypatch.setattr("onelaunch.training.loop.evaluate", scripted)
    r = recipe(train__updates=6, train__accum=1, eval__every=1, checkpoint__every=1)
    result = runs.start(r, tmp_path / "run", quiet=True)
    names = [path.name for path in list_checkpoints(tmp_path / "run")]
    assert names == ["update-00000002", "update-00000005", "update-00000006"]
    assert best_checkpoint(tmp_path / "run").name == "update-00000002"
    assert (result.progress.best_update, result.progress.best_val_loss) == (2, 2.0)
    loaded = run_folder.read(tmp_path / "run")
    best = run_folder.read(tmp_path / "run" / "checkpoints" / "update-00000002")
    assert torch.equal(loaded.weights["norm.weight"], best.weights["norm.weight"])


def runs_evaluate():
    from onelaunch.training.evaluate import evaluate

    return evaluate


WORK = {"data": 1.0, "forward": 2.0, "backward": 4.0, "optimizer": 8.0}
"""Seconds of the clock of the test below, for each micro-step and each update."""
EVALUATION, CHECKPOINT = 16.0, 32.0


def test_telemetry_explains_the_wall_time(tmp_path, monkeypatch):
    """A clock that moves only where there is work: every part has its own, nothing is left."""
    now = [0.0]
    monkeypatch.setattr("onelaunch.training.clock.time.perf_counter", lambda: now[0])

    def takes(seconds, place, name):
        does = getattr(place, name)

        def slow(*args, **kwargs):
            now[0] += seconds
            return does(*args, **kwargs)

        monkeypatch.setattr(place, name, slow)

    takes(WORK["data"], torch, "from_numpy")  # twice: tokens and targets
    takes(WORK["forward"], Model, "loss")
    takes(WORK["backward"], torch.Tensor, "backward")
    takes(WORK["optimizer"], torch.optim.AdamW, "step")
    takes(EVALUATION, loop, "evaluate")
    takes(CHECKPOINT, state, "save")
    r = recipe(train__updates=4, train__accum=2, eval__every=2, checkpoint__every=1)
    runs.start(r, tmp_path / "run", quiet=True)
    records = updates(tmp_path / "run")
    assert len(records) == 4
    for n, record in enumerate(records):
        seconds = record["seconds"]
        expected = dict.fromkeys(PARTS, 0.0) | WORK | {"forward": 4.0, "backward": 8.0}
        expected |= {"data": 4.0}
        if n > 0:  # what lies between two updates is the next one's
            expected["checkpoint"] = CHECKPOINT
        if n == 2:
            expected["evaluation"] = EVALUATION + 4 * WORK["data"]  # of its two batches
        wall = sum(expected.values())
        assert seconds == expected | {"wall": wall, "unexplained": 0.0}, n


def test_metrics_are_plain_json_with_a_schema(tmp_path):
    runs.start(recipe(), tmp_path / "run", quiet=True)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert records[0]["kind"] == "run"
    assert records[0]["schema"] == 1
    assert records[0]["synthetic"] is True
    assert {r["kind"] for r in records} == {"run", "update", "eval", "sample", "end"}


def read_late(monkeypatch):
    """An update's figures are read when the next one is launched, as on a GPU."""
    prepare = Trainer.__post_init__

    def prepared(self):
        prepare(self)
        self._reads_late = True

    monkeypatch.setattr(Trainer, "__post_init__", prepared)


def test_figures_that_are_read_late_are_the_same_in_the_same_order(tmp_path, monkeypatch):
    r = recipe()
    runs.start(r, tmp_path / "at once", quiet=True)
    read_late(monkeypatch)
    runs.start(r, tmp_path / "late", quiet=True)
    at_once, late = (
        [
            (record["kind"], record.get("update"), record.get("loss"), record.get("tokens"))
            for record in read_metrics(tmp_path / name / "metrics.jsonl")
        ]
        for name in ("at once", "late")
    )
    assert late == at_once
    assert [kind for kind, *_ in late].count("update") == r.train.updates


@pytest.mark.parametrize("late", [False, True])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(
    tmp_path, monkeypatch, late
):
    r = recipe()
    if late:
        read_late(monkeypatch)
    sampler_next = {}

    def poisoned(self):
        sampler_next["n"] = sampler_next.get("n", 0) + 1
        if sampler_next["n"] == 14:
            with torch.no_grad():
                self.parameters["norm.weight"].fill_(math.nan)
        micro_step(self)

    micro_step = Trainer._micro_step
    monkeypatch.setattr(Trainer, "_micro_step", poisoned)
    with pytest.raises(RunFailed, match="at update 5; stopped; .*checkpoint is .*update-0"):
        runs.start(r, tmp_path / "run", quiet=True)
    assert list_checkpoints(tmp_path / "run")[-1].name == "update-00000004"
    good = run_folder.read(tmp_path / "run")
    assert all(t.isfinite().all() for t in good.weights.values())
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1] == {"kind": "diverged", "update": 5}
    monkeypatch.undo()
    runs.start(r, tmp_path / "whole", quiet=True)
    runs.resume(tmp_path / "run", {}, quiet=True)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, monkeypatch):
    r = recipe()
    save_file = tensors.save_file

    def full(values, path, metadata):
        save_file(values, path, metadata)
        if "update-00000004" in str(path) and "optimizer" in str(path):
            raise tensors.SafetensorError(f"I/O error: no space (os error {errno.ENOSPC})")

    monkeypatch.setattr(tensors, "save_file", full)
    with pytest.raises(RunFailed, match="the disk is full"):
        runs.start(r, tmp_path / "run", quiet=True)
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == ["update-00000002"]
    monkeypatch.undo()
    runs.start(r, tmp_path / "whole", quiet=True)
    runs.resume(tmp_path / "run", {}, quiet=True)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_folders_that_cannot_be_used(tmp_path):
    r = recipe(train__updates=1, train__accum=1)
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadInput, match="is a file"):
        runs.start(r, tmp_path / "file", quiet=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(BadInput, match="is not empty"):
        runs.start(r, tmp_path / "full", quiet=True)
    with pytest.raises(BadInput, match="run.json.*nothing to resume"):
        runs.resume(tmp_path / "full", {}, quiet=True)
    with pytest.raises(BadInput, match="cannot write"):
        runs.start(r, tmp_path / "file" / "below", quiet=True)
    with pytest.raises(BadInput, match="exceeds the model's context"):
        runs.start(recipe(train__seq_len=33), tmp_path / "long", quiet=True)
    assert not (tmp_path / "long").exists()


def test_resume_refuses_another_model_other_data_and_a_changed_unfinished_update(
    tmp_path, stop_after, monkeypatch
):
    run = tmp_path / "run"
    stop_after(4)
    runs.start(recipe(), run, quiet=True)
    monkeypatch.undo()
    with pytest.raises(BadInput, match="another model"):
        runs.resume(run, {"model.dim": 64}, quiet=True)
    with pytest.raises(BadInput, match="another model"):
        runs.resume(run, {}, recipe(model__n_layers=1), quiet=True)
    with pytest.raises(BadInput, match="same accum"):
        runs.resume(run, {"train.accum": 5}, quiet=True)
    run_folder.change_state(list_checkpoints(run)[-1], {"data": "another"})
    with pytest.raises(BadInput, match="same data"):
        runs.resume(run, {}, quiet=True)


def test_two_processes_cannot_train_in_one_folder(tmp_path):
    run = tmp_path / "run"
    runs.start(recipe(train__updates=1, train__accum=1), run, quiet=True)
    with runs._run_lock(run), pytest.raises(BadInput, match="another process"):
        runs.resume(run, {}, quiet=True)


def test_checkpoints_by_the_clock_fall_inside_long_updates(tmp_path, stop_after, monkeypatch):
    r = recipe(train__accum=6, train__updates=1, checkpoint__minutes=0.01, eval__every=0)
    now = [0.0]

    def clock():
        now[0] += 0.25
        return now[0]

    monkeypatch.setattr("onelaunch.training.loop.time.monotonic", clock)
    names = []
    write = run_folder.write_checkpoint

    def noted(*args):
        names.append(write(*args).name)
        return args[0] / "checkpoints" / names[-1]

    monkeypatch.setattr("onelaunch.training.state.write_checkpoint", noted)
    runs.start(r, tmp_path / "run", quiet=True)
    assert any("micro" in name for name in names)
    assert names[-1] == "update-00000001"


def test_a_refused_resume_changes_nothing(tmp_path):
    run = tmp_path / "run"
    runs.start(recipe(), run, quiet=True)
    before = (run / "recipe.toml").read_bytes()
    for settings, words in (
        ({"train.seq_len": 33}, "seq_len 33 exceeds"),
        ({"train.seq_len": 16}, "seq_len is 32, not 16"),
        ({"train.device": "cuda:77"}, "cuda"),
        ({"model.dim": 64}, "another model"),
    ):
        with pytest.raises(BadInput, match=words):
            runs.resume(run, settings, quiet=True)
        assert (run / "recipe.toml").read_bytes() == before
    runs.resume(run, {}, quiet=True)


def test_damaged_checkpoints_are_set_aside_and_never_push_out_whole_ones(tmp_path):
    r = recipe(train__updates=8, eval__every=0, checkpoint__keep=3)
    runs.start(r, tmp_path / "whole", quiet=True)
    run = tmp_path / "cut"
    runs.start(r, run, quiet=True)
    for checkpoint in list_checkpoints(run)[-2:]:
        with open(checkpoint / "model.safetensors", "ab") as file:
            file.write(b"x")
    assert len(list_checkpoints(run)) == 3
    done = runs.resume(run, {"checkpoint.keep": 1, "checkpoint.every": 1}, quiet=True)
    assert done.progress.update == 8
    assert newest_valid_checkpoint(run)[0].name == "update-00000008"
    assert len(list((run / "checkpoints").glob("*.damaged"))) == 2
    a, b = outcome(run), outcome(tmp_path / "whole")
    assert (a["losses"], a["sha256"]) == (b["losses"], b["sha256"])


def test_partial_checkpoints_do_not_push_out_whole_updates(tmp_path, monkeypatch):
    r = recipe(train__updates=2, train__accum=6, eval__every=0, checkpoint__every=1)
    monkeypatch.setattr(Trainer, "_save_if_overdue", lambda self: self._save())
    kept = []
    prune = run_folder.prune_checkpoints

    def pruned(run, keep):
        prune(run, keep)
        kept.append([path.name for path in list_checkpoints(run)])

    monkeypatch.setattr("onelaunch.training.loop.prune_checkpoints", pruned)
    runs.start(r, tmp_path / "run", quiet=True)
    assert kept[0] == ["update-00000000-micro-0001"]
    assert ["update-00000001", "update-00000001-micro-0005"] in kept
    assert kept[-1] == ["update-00000001", "update-00000002"]


def test_gradients_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    r = recipe(train__updates=4, eval__every=0, checkpoint__every=1)
    micro_step, count = Trainer._micro_step, 0

    def poisoned(self):
        nonlocal count
        count += 1
        micro_step(self)
        if count == 8:
            self.parameters["norm.weight"].grad.fill_(math.inf)
            self._save()

    monkeypatch.setattr(Trainer, "_micro_step", poisoned)
    with pytest.raises(RunFailed, match="at update 3; stopped"):
        runs.start(r, tmp_path / "run", quiet=True)
    assert list_checkpoints(tmp_path / "run")[-1].name == "update-00000002"


def test_an_edited_accumulation_inside_an_update_is_refused(tmp_path, stop_after, monkeypatch):
    run = tmp_path / "run"
    stop_after(5)
    runs.start(recipe(), run, quiet=True)
    monkeypatch.undo()
    text = (run / "recipe.toml").read_text()
    (run / "recipe.toml").write_text(text.replace("accum = 3", "accum = 2", 1))
    with pytest.raises(BadInput, match="stopped after 2 of 3 micro-steps"):
        runs.resume(run, {}, quiet=True)


def test_a_start_that_fails_leaves_nothing(tmp_path, monkeypatch):
    from tests.training.token_folders import make_folder

    data = make_folder(tmp_path / "data", n_train=20, n_val=20)
    short = recipe(data__path=str(data))
    with pytest.raises(BadInput, match="sequence"):
        runs.start(short, tmp_path / "a" / "run", quiet=True)
    assert not (tmp_path / "a").exists()

    def full(path, data):
        raise BadInput(f"{path}: cannot write: the disk is full")

    monkeypatch.setattr(runs, "write_json", full)
    with pytest.raises(BadInput, match="the disk is full"):
        runs.start(recipe(), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="the disk is full"):
        runs.start(recipe(), tmp_path / "empty", quiet=True)
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_folder_that_a_killed_start_left_is_used(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "recipe.toml").write_text("")
    (run / ".recipe.toml.77.tmp").write_text("")
    runs.start(recipe(train__updates=1, train__accum=1), run, quiet=True)
    assert (run / "run.json").exists()


def test_a_damaged_best_json_falls_back_to_the_newest(tmp_path):
    run = tmp_path / "run"
    runs.start(recipe(), run, quiet=True)
    (run / "best.json").write_text("{")
    assert best_checkpoint(run) is None
    newest = run_folder.read(list_checkpoints(run)[-1])
    assert torch.equal(run_folder.read(run).weights["norm.weight"], newest.weights["norm.weight"])
    runs.resume(run, {"train.updates": 7}, quiet=True)


def test_a_stop_before_the_loop_begins_is_saved(tmp_path, monkeypatch):
    opened = runs.open_data

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return opened(*args)

    monkeypatch.setattr(runs, "open_data", interrupted)
    stopped = runs.start(recipe(), tmp_path / "cut", quiet=True)
    assert (stopped.signal, stopped.progress.update) == (signal.SIGTERM, 0)
    monkeypatch.undo()
    runs.start(recipe(), tmp_path / "whole", quiet=True)
    runs.resume(tmp_path / "cut", {}, quiet=True)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def test_of_two_starts_at_once_one_gets_the_folder(tmp_path, monkeypatch):
    run, r = tmp_path / "run", recipe(train__updates=1, train__accum=1)
    opened = runs.open_data

    def the_other_was_faster(*args):
        monkeypatch.undo()
        runs.start(r, run, quiet=True)
        return opened(*args)

    monkeypatch.setattr(runs, "open_data", the_other_was_faster)
    with pytest.raises(BadInput, match="is not empty"):
        runs.start(recipe(train__updates=3), run, quiet=True)
    assert Recipe.load(str(run / "recipe.toml")) == r
    assert list_checkpoints(run)[-1].name == "update-00000001"
