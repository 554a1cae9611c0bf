"""What the report has after its story, in sentences and tables, however it is written."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, get_args

from onelaunch.bench.core.findings import ANSWERS, Verdict
from onelaunch.bench.core.published import Published, Study
from onelaunch.bench.core.tables import digits
from onelaunch.bench.experiments import EXPERIMENTS, NOT_ON_A_GPU
from onelaunch.bench.report.gather import Part, Record, Report

TITLE = "onelaunch and two published studies"
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
STUDIES: dict[Study, str] = {
    "mega-kernel": "Layers in one program, and training around it (an Apple M1 Pro)",
    "block-row": "RMSNorm with several rows in a program (an RTX 5060 Ti, bfloat16)",
}
READING = (
    "A verdict is of the device next to it: confirmed, what was published holds there too; "
    "refuted, it does not; inconclusive, the figure is too near the bar for this machine's noise, "
    "or the record lacks what it would be compared with; quick run, the record is of one; "
    "arithmetic, it follows from other figures and was not measured; not applicable, the device "
    "has nothing of the kind, or only the study's own could answer: the reason then says that it "
    "needs a Mac. A speedup's direction (more than 1x) and its size (half of the published gain) "
    "are two statements. The studies measured on other devices: a ratio, ours over theirs, "
    "compares devices as much as programs.",
    "The figures of a table were measured in one run, interleaved. Figures of different runs on a "
    "CPU are not compared: its cores are shared, and their speed changes from hour to hour. A "
    "spread is from the 20th to the 80th percentile of a case's n samples in one run; what was "
    "measured once has none.",
)
AGAIN_TITLE = "A second run"
FINDING_HEADER = ("claim", "published", "device", "ours", "ratio", "verdict", "why")

Cell = str | Mapping[str, str]
"""A text, or one for each device."""


class Line(NamedTuple):
    """A table's line, and the device that it is of, if it is of one."""

    device: str
    cells: Sequence[Cell]


class Table(NamedTuple):
    """`left`: how many columns are aligned to the left; the others, numbers, to the right."""

    header: Sequence[str]
    lines: Sequence[Line]
    left: int


def summary(report: Report) -> str:
    """The summary at the report's beginning."""
    rows = report.published
    answered = [key for key in rows if report.answers(key)]
    impossible = [key for key in rows if rows[key].why_not and key not in answered]
    open_ = len(rows) - len(answered) - len(impossible)
    return (
        f"{len(report.parts)} records of {len(report.devices)} devices, and the {len(rows)} rows "
        f"that two studies published: {len(answered)} have a verdict, {len(impossible)} cannot "
        f"have one, {open_} wait for a record or for its finding."
    )


def summary_table(report: Report) -> Table:
    """A table of the numbers of confirmed and refuted statements, a line for each device."""
    lines = []
    for device in report.devices:
        counts = report.verdicts(device)
        records = sum(part.device == device for part in report.parts)
        answered = f"{report.answered(device)} of {len(report.published)}"
        verdicts = (str(counts[verdict]) for verdict in VERDICTS)
        lines.append(Line(device, [device, *verdicts, answered, str(records)]))
    header = ("statements by device", *VERDICTS, "published rows answered", "records")
    return Table(header, lines, 1)


def described(experiment: str) -> str:
    """An experiment in a sentence, where bench knows it; and why a GPU has no record of it."""
    about, not_there = EXPERIMENTS.get(experiment), NOT_ON_A_GPU.get(experiment)
    if not about:
        return ""
    return f"{about[0].upper()}{about[1:]}." + (f" Not on a GPU: {not_there}." if not_there else "")


def findings_table(parts: Sequence[Part]) -> Table | None:
    """Every finding of an experiment, those of one claim together; None without one."""
    claims: dict[tuple[tuple[str, ...], str], list[Line]] = {}
    for part in parts:
        for f in part.findings:
            cells = [f.claim, f.published or "-", part.device, f.ours or "-", times(f.ratio),
                     f.verdict, f.why]  # fmt: skip
            claims.setdefault((f.answers, f.claim), []).append(Line(part.device, cells))
    lines = [line for of_a_claim in claims.values() for line in of_a_claim]
    return Table(FINDING_HEADER, lines, len(FINDING_HEADER)) if lines else None


def rows_table(record: Record) -> Table:
    """Every row of a record."""
    lines = [
        Line("", [row["case"], _amount(row.get("ours")), record["unit"],
                  _spread(row.get("spread")), _amount(row.get("n"))])
        for row in record["rows"]
    ]  # fmt: skip
    return Table(("case", "ours", "unit", "p20 to p80", "n"), lines, 1)


def published_tables(report: Report) -> Iterator[tuple[str, Table]]:
    """Every published row with its verdicts, or why there is none; study by study."""
    header = ("row", "figures", "experiment", "verdict")
    for study, name in STUDIES.items():
        lines = [
            Line(
                "",
                [
                    f"{row.table}: {row.row}",
                    figures(row) or "-",
                    row.answer or "-",
                    {device: counted(n) for device, n in report.answers(key).items()}
                    or report.unanswered(key),
                ],
            )
            for key, row in report.published.items()
            if row.study == study
        ]
        yield name, Table(header, lines, len(header))


def again(report: Report) -> tuple[str, list[Table]]:
    """Whether a second run of the same experiments has the same verdicts, statement by statement:
    in a sentence, by experiment, and the statements whose verdict changed. Nothing where no
    experiment has findings in both runs on a device. Figures of different runs are not compared."""
    second = {(part.experiment, part.device): part for part in report.again}
    by_experiment: list[Line] = []
    changed: list[Line] = []
    statements = opposite = 0
    for part in report.parts:
        other = second.get((part.experiment, part.device))
        if not part.findings or other is None:
            continue
        theirs = {(f.answers, f.claim): f for f in other.findings}
        pairs = [(f, theirs[key]) for f in part.findings if (key := (f.answers, f.claim)) in theirs]
        differing = [(a, b) for a, b in pairs if a.verdict != b.verdict]
        alone = len(part.findings) + len(other.findings) - 2 * len(pairs)
        counts = len(pairs), len(pairs) - len(differing), len(differing), alone
        by_experiment.append(Line(part.device, [part.experiment, part.device, *map(str, counts)]))
        changed += [
            Line(part.device, [a.claim, part.device, a.ours, a.verdict, b.ours, b.verdict])
            for a, b in differing
        ]
        statements += len(pairs)
        opposite += sum(a.verdict in ANSWERS and b.verdict in ANSWERS for a, b in differing)
    if not by_experiment:
        return "", []
    n = len(by_experiment)
    sentence = (
        f"{'1 record was' if n == 1 else f'{n} records were'} made a second time, by a run of its "
        f"own: of {statements} statements {statements - len(changed)} have the same verdict "
        f"again, {len(changed)} another, {opposite} of these the opposite one; the others are "
        "inconclusive in one of the runs: too near a bar."
    )
    header = ("experiment", "device", "statements", "the same verdict", "another", "in one run")
    tables = [Table(header, by_experiment, 2)]
    if changed:
        header = ("claim", "device", "first run", "verdict", "second run", "verdict")
        tables.append(Table(header, changed, len(header)))
    return sentence, tables


def records_table(report: Report) -> Table:
    """Every record with what its figures come from."""
    header = ("experiment", "device", "date", "commit", "versions", "file")
    lines = []
    for part in report.parts:
        date, commit = (str(part.record.get(key, "-")) for key in ("date", "commit"))
        versions = ", ".join(f"{k} {v}" for k, v in part.record.get("versions", {}).items())
        cells = [part.experiment, part.device, date, commit, versions, part.where]
        lines.append(Line(part.device, cells))
    return Table(header, lines, len(header))


def times(ratio: float | None) -> str:
    """A ratio as it is read; a dash for none."""
    if ratio is None or not math.isfinite(ratio):
        return "-"
    return f"{digits(ratio) if abs(ratio) >= 0.1 or ratio == 0 else f'{ratio:.2g}'}x"


def figures(row: Published) -> str:
    """The published figures of a row."""
    return "; ".join(
        str(value) if name == "told" else f"{name}: {f'{value:,g}' if _is_number(value) else value}"
        for name, value in row.values.items()
    )


def counted(verdicts: Mapping[Verdict, int]) -> str:
    """Verdicts in words: of one alone its name, of several how many of each."""
    if len(verdicts) == 1:
        return next(iter(verdicts))
    return ", ".join(f"{verdicts[name]} {name}" for name in VERDICTS if verdicts.get(name))


def _amount(value: object) -> str:
    if not _is_number(value):
        return "-"
    assert isinstance(value, int | float)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _spread(ends: object) -> str:
    if isinstance(ends, list) and len(ends) == 2 and all(map(_is_number, ends)):
        return " to ".join(map(_amount, ends))
    return "-"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
