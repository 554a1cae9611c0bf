"""What takes long: every kill, the whole fuzz, Shakespeare, training through ML Programs, forwards
and texts on a GPU; and the quickstart, timed.

python tests/soak.py [--out DIR] [PART...]: quickstart, kills, fuzz, shakespeare, programs, forward,
text.

Leaves records under --out, benchmarks/records by default.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from onelaunch.bench.core.record import (  # noqa: E402
    Row,
    cpu_name,
    device_name,
    record_path,
    write_record,
)
from onelaunch.bench.core.tables import markdown, provenance  # noqa: E402
from onelaunch.checkpoints.atomic import read_json, write_text  # noqa: E402
from tests.kills import interrupt_until_done, outcome, run_to_the_end  # noqa: E402

TEXT = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"
KILLS = 50
PROGRAM_KILLS = 20
EXAMPLES = 10_000


def quickstart(out: Path) -> bool:
    """What `make run` does after the installation, each verb a process of its own."""
    from onelaunch.engines.reference import resolve_device

    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        started = time.monotonic()
        _onelaunch("train", "quickstart", "--run", run, "--quiet")
        trained = time.monotonic() - started
        loss = json.loads(_onelaunch("eval", run, "--data", "stories", "--json"))["loss"]
        words = ("generate", run, "--temperature", 0.5, "--seed", 4, "--quiet")
        story = _onelaunch(*words)
        seconds = time.monotonic() - started
        same = story == _onelaunch(*words)
    print(f"quickstart: {seconds:.1f} s, validation loss {loss:.4f}\n{story}", flush=True)
    notes = {"training_seconds": round(trained, 1), "validation_loss": loss, "story": story.strip()}
    row = Row("train, eval, generate", seconds, notes=notes)
    _write("quickstart", "s", [row], out, device_name(str(resolve_device("auto"))))
    return same and seconds < 150


def kills(out: Path) -> bool:
    """Kill a run with SIGKILL at 50 random moments; its losses must be those of one left alone."""
    # long enough that it is still running after the last kill
    long = {"train__updates": 6000, "checkpoint__every": 20}
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        run_to_the_end(whole, **long)
        story = interrupt_until_done(killed, KILLS, seed=7, **long)
        equal = outcome(killed) == outcome(whole)
    did = sum(part["exit"] == -9 for part in story)
    lost = max(part["updates_lost"] for part in story)
    print(f"kills: {did} of {KILLS} killed; every loss as in the run left alone: {equal}")
    print(f"kills: at most {lost} updates were done again after a kill; a checkpoint every 20")
    row = Row(
        f"kill -9 at {KILLS} random moments",
        did if equal else 0,
        n=len(story),
        notes={
            "losses_and_last_checkpoint_identical": equal,
            "most_updates_lost": lost,
            "checkpoint_every": 20,
            "seconds_run": [part["seconds"] for part in story],
        },
    )
    _write("soak-kills", "exact resumes", [row], out)
    return equal and did == KILLS and lost <= 20


def fuzz(out: Path) -> bool:
    """10,000 mutants of every readable format, one process each."""
    from tests.fuzz import FORMATS

    rows, good = [], True
    for name in FORMATS:
        started = time.monotonic()
        command = [sys.executable, str(ROOT / "tests" / "fuzz.py"), "--format", name]
        command += ["--examples", str(EXAMPLES), "--seed", "1"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        result = json.loads(done.stdout.splitlines()[-1])
        good &= done.returncode == 0
        print(f"fuzz: {result} in {time.monotonic() - started:.0f} s", flush=True)
        notes = {key: result[key] for key in ("accepted", "failure", "peak_growth_mb")}
        rows.append(Row(name, result["read"], n=result["read"], notes=notes))
    _write("soak-fuzz", "mutants read without a foreign error", rows, out)
    return good


def shakespeare(out: Path) -> bool:
    """Train shakespeare-char through the command line; eval must print at most 1.70 nats."""
    if not TEXT.exists():
        print("shakespeare: skipped: tinyshakespeare.txt is not here")
        return True
    losses, seconds = [], []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        _onelaunch("prepare", TEXT, "--out", data, "--quiet")
        for seed in (1337, 1338, 1339):
            run = Path(folder) / f"run-{seed}"
            started = time.monotonic()
            _onelaunch(
                "train", "shakespeare-char", "--data", data, "--run", run, "--quiet",
                "--device", "cpu", "--set", f"train.seed={seed}",
            )  # fmt: skip
            seconds.append(time.monotonic() - started)
            printed = json.loads(_onelaunch("eval", run, "--data", data, "--json"))
            losses.append(printed["loss"])
            print(f"shakespeare: seed {seed}: {printed} after {seconds[-1]:.0f} s", flush=True)
    row = Row.of(
        "shakespeare-char 2000 updates",
        losses,
        peers={"nanoGPT, same budget": 1.88, "plain PyTorch, same shape": 1.666},
        notes={
            "tokens": printed["tokens"],
            "window": printed["window"],
            "losses": losses,
            "training_seconds": round(statistics.median(seconds), 1),
        },
    )
    _write("shakespeare-char", "nats per character", [row], out)
    return max(losses) <= 1.70


def programs(out: Path) -> bool:
    """Train through ML Programs: losses as the reference trainer's with weights as old, within 1%;
    and killed at 20 random moments."""
    from tests.program_soak import beside_the_reference, killed

    beside = beside_the_reference()
    print(f"programs: losses at most {beside.ours:.3%} from the reference's", flush=True)
    kill = killed(PROGRAM_KILLS)
    print(f"programs: {kill.ours:.0f} of {PROGRAM_KILLS} kills resumed exactly", flush=True)
    _write("soak-programs", "see the case", [beside, kill], out)
    return beside.ours < 0.01 and kill.ours == PROGRAM_KILLS


def forward(out: Path) -> bool:
    """100,000 forwards in changing shapes and forms, and 1,000 seeds of delays: no wrong bit."""
    import torch

    if not torch.cuda.is_available():
        print("forward: skipped: no NVIDIA GPU here")
        return True
    from tests.gpu.soak_forward import consecutive, delayed

    rows = [consecutive(), delayed()]
    for row in rows:
        print(f"forward: {row.case}: {row.ours:,.0f} of {row.n:,} right; {row.notes}", flush=True)
    device = torch.cuda.get_device_name()
    _write("forward-soak", "forwards without a wrong bit", rows, out, device)
    table = markdown(
        ["case", "forwards", "without a wrong bit", "seconds"],
        [
            [row.case, f"{row.n:,}", f"{row.ours:,.0f}", f"{row.notes['seconds']:,.0f}"]
            for row in rows
        ],
    )
    path = record_path("forward-soak", out, device)
    text = f"# Forwards on {device}\n\n{provenance(read_json(path))}\n\n{table}\n"
    write_text(path.with_suffix(".md"), text)
    return all(row.ours == row.n for row in rows)


def text(out: Path) -> bool:
    """10,000 generations in sessions of every form: each as alone."""
    import torch

    if not torch.cuda.is_available():
        print("text: skipped: no NVIDIA GPU here")
        return True
    from tests.gpu.soak_text import generations

    row = generations()
    print(f"text: {row.ours:,.0f} of {row.n:,} right; {row.notes}", flush=True)
    _write("text-soak", "generations as alone", [row], out, torch.cuda.get_device_name())
    return row.ours == row.n


def _onelaunch(*words: object) -> str:
    command = [sys.executable, "-m", "onelaunch", *map(str, words)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def _write(
    experiment: str, unit: str, rows: list[Row], out: Path, device: str | None = None
) -> None:
    path = write_record(experiment, unit, rows, out, device or cpu_name())
    print(f"record: {path}", flush=True)


def main() -> int:
    parts = {
        "quickstart": quickstart,
        "kills": kills,
        "fuzz": fuzz,
        "shakespeare": shakespeare,
        "programs": programs,
        "forward": forward,
        "text": text,
    }
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "records")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(parts)}")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.parts if name not in parts]
    if unknown:
        parser.error(f"unknown part {unknown[0]}")
    results = {name: parts[name](arguments.out) for name in arguments.parts or parts}
    passed = sum(results.values())
    print(f"{passed} passed, {len(results) - passed} failed")
    return 0 if passed == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
