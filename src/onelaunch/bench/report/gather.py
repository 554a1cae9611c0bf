"""Many records as one report: what each says of the published studies, its table, its rows.

`gather` reads records and asks their experiments' modules; html.py and markdown.py write what it
found. Nothing is measured: the same records make the same report, byte for byte.
"""

from __future__ import annotations

import importlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, get_args

from onelaunch.bench.core.findings import Finding, Verdict
from onelaunch.bench.core.published import PUBLISHED, Published
from onelaunch.bench.core.record import rows_there
from onelaunch.bench.core.runner import in_a_line
from onelaunch.bench.core.tables import digits, provenance
from onelaunch.bench.experiments import EXPERIMENTS, NOT_ON_A_GPU, module_name
from onelaunch.checkpoints.atomic import read_json
from onelaunch.errors import BadInput

Record = dict[str, Any]
T = TypeVar("T")

TITLE = "onelaunch beside two published studies"
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
NO_RECORD = "no record yet"
NO_FINDING = "no finding of it in the record"
STUDIES = {
    "mega-kernel": "Layers in one program, and training around it (an Apple M1 Pro)",
    "block-row": "RMSNorm with several rows in a program (an RTX 5060 Ti, bfloat16)",
}
READING = (
    "A verdict is of the device that stands beside it: confirmed, what was published holds there "
    "too; refuted, it does not; inconclusive, the figure is too near the bar for this machine's "
    "noise, or the record lacks what it would be compared with; quick run, the record is of one; "
    "arithmetic, it follows from other figures and was not measured; not applicable, the device "
    "has nothing of the kind, or only the study's own could answer: the reason then says that it "
    "needs a Mac. A speedup's direction (more than 1x) and its size (half of the published gain) "
    "are two statements. The studies measured on other devices: a ratio, ours over theirs, "
    "compares devices as much as programs.",
    "What stands side by side in a table was measured in one run, in turns. Figures of different "
    "runs on a CPU are not compared: its cores are shared, and their speed changes from hour to "
    "hour. A spread is from the 20th to the 80th percentile of a case's n samples in one run; what "
    "was measured once has none.",
)
ROW_HEADER = ("case", "ours", "unit", "p20 to p80", "n")
PUBLISHED_HEADER = ("row", "figures", "experiment", "verdict")
FINDING_HEADER = ("claim", "published", "device", "ours", "ratio", "verdict", "why")


@dataclass(frozen=True)
class Part:
    """What a report has of one record; `problems` say what could not be made of it."""

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
    that they are held against; and the parts of a second run, where there was one."""

    parts: tuple[Part, ...]
    published: Mapping[str, Published]
    again: tuple[Part, ...] = ()

    @property
    def devices(self) -> list[str]:
        return sorted({part.device for part in self.parts})

    @property
    def experiments(self) -> dict[str, list[Part]]:
        found: dict[str, list[Part]] = {}
        for part in self.parts:
            found.setdefault(part.experiment, []).append(part)
        return found

    def verdicts(self, device: str) -> Counter[Verdict]:
        """How many statements found which verdict on a device."""
        parts = [part for part in self.parts if part.device == device]
        return Counter(finding.verdict for part in parts for finding in part.findings)

    def answers(self, key: str) -> dict[str, Counter[Verdict]]:
        """The verdicts on a published row, by device."""
        found: dict[str, Counter[Verdict]] = {}
        for part in self.parts:
            for finding in part.findings:
                if key in finding.answers:
                    found.setdefault(part.device, Counter())[finding.verdict] += 1
        return found

    def answered(self, device: str) -> int:
        """How many published rows have a verdict on a device."""
        keys = {
            key
            for part in self.parts
            if part.device == device
            for finding in part.findings
            for key in finding.answers
        }
        return len(keys & self.published.keys())

    def unanswered(self, key: str) -> str:
        """Why a published row has no verdict."""
        row = self.published[key]
        if row.why_not:
            return row.why_not
        return NO_FINDING if row.answer in self.experiments else NO_RECORD


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
    found: dict[Path, Path] = {}
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
            found.setdefault(each.resolve(), each)
    return list(found.values())


def read_record(path: Path) -> Record:
    """A record from its file. Raises BadInput, with its name, where it is none."""
    rows_there(path)
    record = read_json(path)
    for key in ("experiment", "device", "unit"):
        if not isinstance(record.get(key), str):
            raise BadInput(f"{path}: its {key} is no text; leave out what is no record")
    if not isinstance(record.get("versions", {}), dict):
        raise BadInput(f"{path}: its versions are no object; leave out what is no record")
    if not all(isinstance(row["case"], str) for row in record["rows"]):
        raise BadInput(f"{path}: a row's case is no text; leave out what is no record")
    return record


def _part(path: Path, record: Record, published: Mapping[str, Published]) -> Part:
    problems: list[str] = []
    module = module_of(record["experiment"], problems)
    found: list[Finding] = _asked("findings", _maker(module, "findings"), record, [], problems)
    problems += [
        f"{finding.claim}: answers {key}, which is no published row"
        for finding in found
        for key in finding.answers
        if key not in published
    ]
    table = _asked("a table", _maker(module, "table"), record, "", problems)
    origin = _asked("its origin", provenance, record, "", problems)
    return Part(path, record, tuple(found), table, origin, tuple(problems))


def module_of(experiment: str, problems: list[str]) -> ModuleType | None:
    """The module of an experiment that bench knows; a record may name anything."""
    if experiment not in EXPERIMENTS:
        return None
    try:
        return importlib.import_module(module_name(experiment))
    except Exception as error:
        problems.append(f"without findings and a table: {in_a_line(error)}")
        return None


def _maker(module: ModuleType | None, name: str) -> Callable[[Record], Any] | None:
    return getattr(module, name, None)


def _asked(
    what: str, make: Callable[[Record], T] | None, record: Record, nothing: T, problems: list[str]
) -> T:
    """What `make` has of a record. An older record may lack what it reads: that is said, and the
    other records keep their report."""
    if make is None:
        return nothing
    try:
        made = make(record)
        if not isinstance(made, type(nothing)):
            raise TypeError(f"{type(made).__name__} in the place of {type(nothing).__name__}")
        return made
    except Exception as error:
        problems.append(f"without {what}: {in_a_line(error)}")
        return nothing


def summary(report: Report) -> list[str]:
    """What a reader should know first, in sentences."""
    rows = report.published
    answered = [key for key in rows if report.answers(key)]
    impossible = [key for key in rows if rows[key].why_not and key not in answered]
    open_ = len(rows) - len(answered) - len(impossible)
    return [
        f"{len(report.parts)} records of {len(report.devices)} devices, held against the "
        f"{len(rows)} rows that two studies published: {len(answered)} have a verdict, "
        f"{len(impossible)} cannot have one, {open_} wait for a record or for its finding."
    ]


def summary_lines(report: Report) -> tuple[Sequence[str], list[list[str]]]:
    """Header and cells: how many statements are confirmed, and refuted, a line for each device."""
    header = ("statements by device", *VERDICTS, "published rows answered", "records")
    lines = []
    for device in report.devices:
        counts = report.verdicts(device)
        records = sum(part.device == device for part in report.parts)
        lines.append(
            [device, *(str(counts[verdict]) for verdict in VERDICTS),
             f"{report.answered(device)} of {len(report.published)}", str(records)]
        )  # fmt: skip
    return header, lines


def finding_lines(parts: Sequence[Part]) -> list[tuple[str, list[str]]]:
    """Device and cells of every finding of an experiment; what is of one claim stands together."""
    claims: dict[tuple[tuple[str, ...], str], list[tuple[str, Finding]]] = {}
    for part in parts:
        for finding in part.findings:
            claim = finding.answers, finding.claim
            claims.setdefault(claim, []).append((part.device, finding))
    return [
        (
            device,
            [
                f.claim, f.published or "-", device, f.ours or "-", times(f.ratio), f.verdict, f.why
            ],
        )
        for findings in claims.values()
        for device, f in findings
    ]  # fmt: skip


def row_lines(record: Record) -> list[list[str]]:
    """The cells of every row of a record."""
    return [
        [
            row["case"], _amount(row.get("ours")), record["unit"], _spread(row.get("spread")),
            _amount(row.get("n")),
        ]
        for row in record["rows"]
    ]  # fmt: skip


def times(ratio: float | None) -> str:
    """A ratio as it is read; a dash for none."""
    if ratio is None or not math.isfinite(ratio):
        return "-"
    return f"{digits(ratio) if abs(ratio) >= 0.1 or ratio == 0 else f'{ratio:.2g}'}x"


def figures(row: Published) -> str:
    """What a study has of a row."""
    return "; ".join(
        str(value) if name == "told" else f"{name}: {value if _no_number(value) else f'{value:,g}'}"
        for name, value in row.values.items()
    )


def described(experiment: str) -> str:
    """An experiment in a sentence, where bench knows it; and why a GPU has no record of it."""
    told, not_there = EXPERIMENTS.get(experiment), NOT_ON_A_GPU.get(experiment)
    if not told:
        return ""
    more = f" Not on a GPU: {not_there}." if not_there else ""
    return f"{told[0].upper()}{told[1:]}.{more}"


def counted(verdicts: Mapping[Verdict, int]) -> str:
    """Verdicts in words: of one alone its name, of several how many of each."""
    if len(verdicts) == 1:
        return next(iter(verdicts))
    return ", ".join(f"{verdicts[name]} {name}" for name in VERDICTS if verdicts.get(name))


def _amount(value: object) -> str:
    if _no_number(value):
        return "-"
    assert isinstance(value, int | float)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _spread(ends: object) -> str:
    if not isinstance(ends, list) or len(ends) != 2 or any(map(_no_number, ends)):
        return "-"
    return " to ".join(map(_amount, ends))


def _no_number(value: object) -> bool:
    return not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value)
