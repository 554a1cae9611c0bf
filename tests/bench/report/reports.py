"""An experiment and its records, made up for the report's tests."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

from onelaunch.bench.core.findings import Finding
from onelaunch.bench.core.published import Published
from onelaunch.bench.core.tables import markdown
from onelaunch.bench.experiments import EXPERIMENTS, MODULES, module_name

CPU, GPU = "AMD EPYC, 2 cores", "NVIDIA H200"
PUBLISHED = {
    "price": Published("mega-kernel", "a call", "its price", {"us": 160}, "made-up"),
    "speed": Published("mega-kernel", "a call", "fewer", {"speedup": 3.7}, "made-up"),
    "later": Published("block-row", "rows", "4096", {"ms": 1234.5}, "rms-norm"),
    "never": Published(
        "block-row", "a claim", "elsewhere", {"told": "yes"}, why_not="no such chip"
    ),
}


def finding(verdict="confirmed", answers=("price",), **changes):
    words = {"claim": "a call costs", "published": "160 us", "ours": "1.50 us", "why": "measured"}
    return Finding(tuple(answers), verdict=verdict, **(words | changes))


def record(experiment="made-up", device=CPU, rows=None, **changes):
    """As `write_record` leaves one."""
    row = {"case": "a case", "ours": 1.5, "spread": [1.25, 1.75], "n": 9, "commit": "abc123"}
    return {
        "schema": 1, "experiment": experiment, "date": "2026-11-22", "commit": "abc123",
        "device": device, "versions": {"torch": "2.11.0"}, "unit": "us",
        "rows": [row] if rows is None else rows,
    } | changes  # fmt: skip


def write(folder, *records):
    """Every record at its place in a folder; returns the paths."""
    paths = []
    for each in records:
        path = folder / each["device"].split()[0].lower() / f"{each['experiment']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(each))
        paths.append(path)
    return paths


def invent(monkeypatch, **views):
    """An experiment "made-up", with these of findings, table and draw."""
    monkeypatch.setitem(EXPERIMENTS, "made-up", "what is <made> up")
    monkeypatch.setitem(MODULES, "made-up", "made_up")
    monkeypatch.setitem(sys.modules, module_name("made-up"), SimpleNamespace(**views))


def table(record):
    """With numbers as our tables write them, unsorted."""
    lines = [["b", "1,234", "12.3%", "0.50x"], ["c", "-", "-", "-"], ["a", "99", "2.5%", "3.4x"],
             ["d", "1e-03", "100%", "10.0x"]]  # fmt: skip
    return f"# Made up on {record['device']}\n\n{markdown(['', 'us', 'share', 'speed'], lines)}\n"
