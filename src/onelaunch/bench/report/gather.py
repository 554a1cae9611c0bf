"""Many records as one report: what each says of the published studies, its table, its rows.

`gather` reads records and calls their experiments' modules; contents.py and story.py say what
they mean, html.py and markdown.py write it. Nothing is measured: the same records make
the same report, byte for byte.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from onelaunch.bench.core.findings import Finding, Verdict
from onelaunch.bench.core.published import PUBLISHED, Published
from onelaunch.bench.core.record import rows_there
from onelaunch.bench.core.tables import provenance
from onelaunch.bench.experiments import EXPERIMENTS, module_name
from onelaunch.checkpoints.atomic import read_json
from onelaunch.compilation.background import in_a_line
from onelaunch.errors import BadInput

Record = dict[str, Any]
T = TypeVar("T")

NO_RECORD = "no record yet"
NO_FINDING = "no finding of it in the record"


@dataclass(frozen=True)
class Part:
    """The parts of a report from one record; `problems` are lines about what could not be made of
    it."""

    path: Path
    record: Record
    findings: tuple[Finding, ...] = ()
    table: str = ""
    origin: str = ""
    problems: tuple[str, ...] = ()

    @property
    def experiment(self) -> str:
        return str(self.record["experiment"])

    @property
    def device(self) -> str:
        return str(self.record["device"])

    @property
    def where(self) -> str:
        """The record's file, wherever the folder of records is."""
        return f"{self.path.parent.name}/{self.path.name}"


@dataclass(frozen=True)
class Report:
    """Parts by experiment, those that answer something first, then by device; the published rows
    that they answer; and the parts of a second run, where there was one."""

    parts: tuple[Part, ...]
    published: Mapping[str, Published]
    again: tuple[Part, ...] = ()

    @property
    def devices(self) -> list[str]:
        return sorted({part.device for part in self.parts})

    @property
    def experiments(self) -> dict[str, list[Part]]:
        experiments: dict[str, list[Part]] = {}
        for part in self.parts:
            experiments.setdefault(part.experiment, []).append(part)
        return experiments

    def findings(self, device: str) -> Iterator[Finding]:
        """Every statement on a device."""
        for part in self.parts:
            if part.device == device:
                yield from part.findings

    def verdicts(self, device: str) -> Counter[Verdict]:
        """The number of statements on a device by verdict."""
        return Counter(finding.verdict for finding in self.findings(device))

    def answers(self, key: str) -> dict[str, Counter[Verdict]]:
        """The verdicts on a published row, by device; of no device that has none."""
        counts = {
            device: Counter(f.verdict for f in self.findings(device) if key in f.answers)
            for device in self.devices
        }
        return {device: count for device, count in counts.items() if count}

    def answered(self, device: str) -> int:
        """The number of published rows that have a verdict on a device."""
        keys = {key for finding in self.findings(device) for key in finding.answers}
        return len(keys & self.published.keys())

    def unanswered(self, key: str) -> str:
        """Why a published row has no verdict."""
        row = self.published[key]
        return row.why_not or (NO_FINDING if row.answer in self.experiments else NO_RECORD)


def gather(
    paths: Iterable[Path],
    published: Mapping[str, Published] = PUBLISHED,
    again: Iterable[Path] = (),
) -> Report:
    """Everything about the records at these paths, files or folders of them, and of those of a
    second run in `again`. Raises BadInput, with the file's name, for one that is no record; a
    record whose experiment cannot make findings or a table of it is kept, with a line that says
    so."""
    parts, second = (
        [_part(path, read_record(path), published) for path in record_files(each)]
        for each in (paths, again)
    )
    answering = {part.experiment for part in parts if part.findings}
    order = {name: place for place, name in enumerate(EXPERIMENTS)}
    parts.sort(
        key=lambda part: (
            part.experiment not in answering, order.get(part.experiment, len(order)),
            part.experiment, part.device, part.where,
        )
    )  # fmt: skip
    return Report(tuple(parts), published, tuple(second))


def record_files(paths: Iterable[Path]) -> list[Path]:
    """The files at these paths, each once; of a folder those in it and in its own folders."""
    files: dict[Path, Path] = {}
    for path in paths:
        if path.is_dir():
            inside = sorted([*path.glob("*.json"), *path.glob("*/*.json")])
            if not inside:
                raise BadInput(f"{path}: holds no records; onelaunch bench makes them")
        elif path.is_file():
            inside = [path]
        else:
            raise BadInput(f"{path}: no such record, and no folder of records")
        for each in inside:
            files.setdefault(each.resolve(), each)
    return list(files.values())


def read_record(path: Path) -> Record:
    """A record from its file. Raises BadInput, with its name, where it is none."""
    rows_there(path)
    record = read_json(path)
    faults = [
        f"its {key} is no text"
        for key in ("experiment", "device", "unit")
        if not isinstance(record.get(key), str)
    ]
    if not isinstance(record.get("versions", {}), dict):
        faults.append("its versions are no object")
    if not all(isinstance(row["case"], str) for row in record["rows"]):
        faults.append("a row's case is no text")
    if faults:
        raise BadInput(f"{path}: {faults[0]}; leave out what is no record")
    return record


def _part(path: Path, record: Record, published: Mapping[str, Published]) -> Part:
    problems: list[str] = []

    def made(what: str, make: Callable[[Record], T] | None, nothing: T) -> T:
        """What `make` makes of the record. An older record may lack what it reads: a line says so,
        and the other records keep their report."""
        if make is None:
            return nothing
        try:
            result = make(record)
            if not isinstance(result, type(nothing)):
                raise TypeError(f"{type(result).__name__} in the place of {type(nothing).__name__}")
            return result
        except Exception as error:
            problems.append(f"without {what}: {in_a_line(error)}")
            return nothing

    module = module_of(record["experiment"], problems)
    no_findings: list[Finding] = []
    findings = made("findings", getattr(module, "findings", None), no_findings)
    problems += [
        f"{finding.claim}: answers {key}, which is no published row"
        for finding in findings
        for key in finding.answers
        if key not in published
    ]
    table = made("a table", getattr(module, "table", None), "")
    origin = made("its origin", provenance, "")
    return Part(path, record, tuple(findings), table, origin, tuple(problems))


def module_of(experiment: str, problems: list[str]) -> ModuleType | None:
    """The module of an experiment that bench knows; a record may name anything."""
    if experiment not in EXPERIMENTS:
        return None
    try:
        return importlib.import_module(module_name(experiment))
    except Exception as error:
        problems.append(f"without findings and a table: {in_a_line(error)}")
        return None
