"""The report: what it says of made-up records, what it refuses, and that it stays the same."""

import json
import re
from pathlib import Path

import pytest

from onelaunch.bench.core import plots
from onelaunch.bench.report import story
from onelaunch.bench.report.contents import FINDING_HEADER, times
from onelaunch.bench.report.gather import gather
from onelaunch.bench.report.html import page
from onelaunch.bench.report.markdown import document
from onelaunch.bench.report.svg import plots_of, story_plots
from onelaunch.errors import BadInput, MissingExtra
from tests.bench.report.reports import CPU, GPU, PUBLISHED, finding, invent, record, table, write

ROOT = Path(__file__).parents[3]
RECORDS, AGAIN = ROOT / "benchmarks/records", ROOT / "benchmarks/again"


def both(report, folder):
    return page(report), document(report, folder)


def section(html, name):
    return html.split(f'<section id="{name}"')[1].split("</section>")[0]


@pytest.fixture
def held(monkeypatch, tmp_path):
    """A report of two devices whose findings differ."""

    def findings(record):
        if record["device"] == GPU:
            return [finding("refuted", ours="0.6 us", ratio=0.00375)]
        return [
            finding(ratio=1234.5),
            finding("not applicable", ["speed"], claim="fewer calls", ours="", why="a quick run"),
            finding("refuted", ["price", "speed"], claim="both"),
        ]

    invent(monkeypatch, findings=findings, table=table)
    write(tmp_path, record(), record(device=GPU), record("quickstart", GPU))
    return gather([tmp_path], PUBLISHED)


def test_verdicts_stand_by_claim_and_device(held, tmp_path):
    html, text = both(held, tmp_path)
    made_up = section(html, "made-up")
    rows = re.findall(r'<tr data-device="([a-z0-9-]+)">(.*?)</tr>', made_up)
    cells = [
        (device, *re.sub(r"(<[^>]+>)+", "|", row).strip("|").split("|")) for device, row in rows
    ]
    cpu, gpu = "amd-epyc-2-cores", "nvidia-h200"
    assert cells == [
        (cpu, "a call costs", "160 us", CPU, "1.50 us", "1,234x", "confirmed", "measured"),
        (gpu, "a call costs", "160 us", GPU, "0.6 us", "0.0037x", "refuted", "measured"),
        (cpu, "fewer calls", "160 us", CPU, "-", "-", "not applicable", "a quick run"),
        (cpu, "both", "160 us", CPU, "1.50 us", "-", "refuted", "measured"),
    ]
    assert '<span class="confirmed">confirmed</span>' in rows[0][1]
    assert '<td data-n="1234">1,234x</td>' in rows[0][1]
    assert "| a call costs | 160 us    | NVIDIA H200" in text


def test_a_card_on_a_phone_names_what_a_column_does(held):
    html = page(held)
    for place, name in enumerate(FINDING_HEADER[1:], start=2):
        assert f'td:nth-child({place})::before {{ content: "{name}: "; }}' in html


def test_the_summary_counts_statements_and_rows_by_device(held, tmp_path):
    html, text = both(held, tmp_path)
    for words in ("3 records of 2 devices", "the 4 rows", "2 have a verdict, 1 cannot have one, 1"):
        assert words in text
    header, _, cpu, gpu = [
        [each.strip() for each in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ][:4]
    assert header[1:7] == [
        "confirmed", "refuted", "inconclusive", "quick run", "arithmetic", "not applicable"
    ]  # fmt: skip
    assert cpu == [CPU, "1", "1", "0", "0", "0", "1", "2 of 4", "1"]
    assert gpu == [GPU, "0", "1", "0", "0", "0", "0", "1 of 4", "2"]
    for words in ("not compared", "20th to the 80th percentile"):
        assert words in html
        assert words in text


def test_every_published_row_has_its_verdict_or_why_there_is_none(held, tmp_path):
    html, text = both(held, tmp_path)
    lines = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:5]]
        for line in text.split("## Every published row")[1].splitlines()
        if line.startswith("| ")
    }
    assert lines["a call: its price"] == [
        "us: 160", "made-up", f"{CPU}: 1 confirmed, 1 refuted; {GPU}: refuted"
    ]  # fmt: skip
    assert lines["a call: fewer"][2] == f"{CPU}: 1 refuted, 1 not applicable"
    assert lines["rows: 4096"] == ["ms: 1,234.5", "rms-norm", "no record yet"]
    assert lines["a claim: elsewhere"] == ["yes", "-", "no such chip"]
    published = section(html, "published")
    for words in ("no record yet", "no such chip", '<a href="#made-up">', "1 confirmed, 1 refuted"):
        assert words in published


def test_a_record_without_findings_is_a_list_of_its_rows(held, tmp_path):
    html, text = both(held, tmp_path)
    assert "| a case |  1.5 |   us | 1.25 to 1.75 |  9 |" in text.split("## quickstart")[1]
    assert "<td>a case</td><td>1.5</td><td>us</td>" in section(html, "quickstart")
    assert "<details open>" in section(html, "quickstart")
    assert "<details>" in section(html, "made-up")
    for words in ("commit abc123", "torch 2.11.0", "2026-11-22", "NVIDIA H200"):
        assert words in section(html, "quickstart")
    assert "nvidia/quickstart.json" in section(html, "records")


def test_what_lies_beside_a_record_is_linked(held, tmp_path):
    (tmp_path / "amd/made-up.png").write_bytes(b"")
    text = document(held, tmp_path / "docs")
    assert "[record](../amd/made-up.json), [plot](../amd/made-up.png): AMD EPYC" in text
    assert "[record](../nvidia/made-up.json): NVIDIA" in text


def test_the_story_tells_what_holds_where(monkeypatch, tmp_path):
    """By claim and device, in the figures of the first statement; plots have ours and theirs."""

    def findings(record):
        key, ours = ["whole-15m"], "2.09x (7 us in 14, 3 so)"
        if record["device"] == GPU:
            return [
                finding(answers=key, claim="faster", ours=ours, ratio=0.5),
                finding("refuted", key, claim="as much faster", ours=ours, ratio=0.5),
            ]
        return [
            finding("not applicable", ["whole-15m"], why="needs a Mac: no other has it"),
            finding(answers=key, published="not measured", claim="a statement of ours"),
        ]

    invent(monkeypatch, findings=findings)
    write(tmp_path, record(), record(device=GPU))
    report = gather([tmp_path])
    html, text = both(report, tmp_path)
    shown = section(html, "story")
    assert "3.00 to 4.17 times" in shown
    assert "4.74 times" not in shown, "a claim that no record answers"
    for words in ("of 2 statements 1 hold, 1 do not, 0 are", "1 of these as they need a Mac"):
        assert words in shown
        assert words in text
    assert f"- {GPU}: **holds** (1 of 2 statements): faster: 2.09x (7 us in 14, 3 so)" in text
    assert f"- {GPU}: **does not hold** (1 of 2 statements): as much faster: 2.09x" in text
    assert f"- {CPU}: **needs a Mac**: a call costs: 1.50 us" in text
    assert "a statement of ours" not in text.partition("## Everything")[0]
    names = (f"{GPU}, faster", f"{GPU}, as much faster")
    drawn = [story.speedups(report, plot) for plot in story.PLOTS]
    assert drawn == [{name: {"whole-15m": pytest.approx(2.085)} for name in names}, {}, {}]


def test_every_table_but_the_summary_is_folded():
    pytest.importorskip("coremltools")
    before, _, main = page(gather([RECORDS], again=[AGAIN])).partition("<main>")
    depth = 0
    for tag in re.findall(r"</?details|<table", main):
        depth += {"<details": 1, "</details": -1}.get(tag, 0)
        assert tag != "<table" or depth, "a table outside a fold"
    assert not depth
    assert before.count("<table") == 1


def test_without_findings_there_is_no_story(tmp_path):
    write(tmp_path, record("quickstart"))
    html, text = both(gather([tmp_path]), tmp_path)
    assert 'id="story"' not in html
    assert story.STORY_TITLE not in text


def test_every_claim_of_the_story_has_published_rows():
    for each in (*story.CLAIMS, *story.PLOTS):
        assert each.keys
        assert set(each.keys) <= story.PUBLISHED.keys()


HOSTILE = "</td><script>alert(1)</script> | `x` \ud800"


def test_nothing_of_a_record_is_markup(monkeypatch, tmp_path):
    invent(
        monkeypatch,
        findings=lambda record: [finding(claim=HOSTILE, ours=HOSTILE, why=HOSTILE)],
        table=lambda record: f"# {record['device']}\n\n{HOSTILE}\n",
        draw=lambda record: None,
    )
    row = {"case": HOSTILE, "ours": "much", "spread": [1], "n": True}
    write(tmp_path, record(device=f"chip {HOSTILE}", rows=[row], commit=HOSTILE, date=HOSTILE))
    report = gather([tmp_path], PUBLISHED)
    html, text = both(report, tmp_path)
    assert html.count("<script>") == 1
    assert "alert(1)</script>" not in html
    assert "&lt;script&gt;alert(1)" in html
    claim = next(line for line in text.splitlines() if "160 us" in line)
    assert len(re.findall(r"(?<!\\)\|", claim)) == 8
    assert "<script" not in text.split("| claim")[1].split("\n\n")[0]
    for each in (html, text):
        each.encode("utf-8")


def broken(record):
    raise KeyError("share")


def test_a_view_that_fails_is_said_and_the_others_stay(monkeypatch, tmp_path):
    invent(monkeypatch, findings=broken, table=broken, draw=broken)
    write(tmp_path, record(), record("quickstart"))
    report = gather([tmp_path], PUBLISHED)
    html = page(report, *plots_of(report.parts))
    made_up = section(html, "made-up")
    for what in ("findings", "a table", "a plot"):
        assert f"without {what}: KeyError: &#x27;share&#x27;" in made_up
    assert "<td>a case</td>" in made_up
    assert "<td>a case</td>" in section(html, "quickstart")
    assert "- without findings: KeyError" in document(report, tmp_path)


def test_a_view_of_another_kind_is_said(monkeypatch, tmp_path):
    invent(monkeypatch, findings=lambda record: None, table=lambda record: ["a"])
    write(tmp_path, record())
    (part,) = gather([tmp_path], PUBLISHED).parts
    assert part.problems == (
        "without findings: TypeError: NoneType in the place of list",
        "without a table: TypeError: list in the place of str",
    )


def test_an_answer_to_nothing_published_is_said(monkeypatch, tmp_path):
    invent(monkeypatch, findings=lambda record: [finding(answers=["prize"])])
    write(tmp_path, record())
    assert "answers prize, which is no published row" in page(gather([tmp_path], PUBLISHED))


def test_an_experiment_that_names_another_module_is_not_imported(tmp_path):
    (path,) = write(tmp_path, record("runner"))
    (part,) = gather([path], PUBLISHED).parts
    assert (part.table, part.problems) == ("", ())


@pytest.mark.parametrize(
    "broken",
    [
        "{", "[]", "", '{"schema": 99}', '{"schema": 1}', '{"schema": 1, "rows": [3]}',
        json.dumps(record() | {"device": None}),
        json.dumps(record() | {"experiment": ["a"]}),
        json.dumps(record() | {"unit": 3}),
        json.dumps(record() | {"versions": []}),
        json.dumps(record(rows=[{"case": 3}])),
    ],
)  # fmt: skip
def test_a_file_that_is_no_record_is_named(broken, tmp_path):
    (path,) = write(tmp_path, record())
    path.write_text(broken)
    with pytest.raises(BadInput, match=r"amd/made-up\.json: "):
        gather([tmp_path], PUBLISHED)


def test_a_place_without_records_is_named(tmp_path):
    with pytest.raises(BadInput, match="holds no records"):
        gather([tmp_path])
    with pytest.raises(BadInput, match=r"none\.json: no such record"):
        gather([tmp_path / "none.json"])


def test_a_record_named_twice_is_one(tmp_path):
    (path,) = write(tmp_path, record("quickstart"))
    assert len(gather([tmp_path, path, path.parent], PUBLISHED).parts) == 1


def test_the_same_records_make_the_same_report(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")

    def draw(record):
        figure = plots.new_figure(3, 2)
        axes = figure.subplots()
        axes.plot([1.23456, 2], [3, 4], marker="o", label="ours")
        axes.set_xlabel("calls")
        axes.set_ylabel("time, us")
        axes.text(1, 3, "0.123456 <b>")
        axes.legend()
        return figure

    invent(monkeypatch, findings=lambda record: [finding()], table=table, draw=draw)
    write(tmp_path, record(), record(device=GPU))
    pages = set()
    for order in (1, -1):
        report = gather(sorted(tmp_path.glob("*/*.json"))[::order], PUBLISHED)
        drawn = plots_of(report.parts)
        pages.add((page(report, *drawn, story_plots(report)), document(report, tmp_path)))
    ((html, _),) = pages
    assert str(tmp_path) not in html
    for words in ("calls</text>", "time, us</text>", "0.123456 &lt;b&gt;</text>"):
        assert html.count(words) == 2
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    for name in re.findall(r'(?:href="#|url\(#)([^")]+)', html):
        assert name in ids


def test_without_matplotlib_one_line_says_so(monkeypatch, tmp_path):
    def draw(record):
        raise MissingExtra("matplotlib", "bench", "the plot")

    invent(monkeypatch, draw=draw)
    write(tmp_path, record(), record(device=GPU))
    report = gather([tmp_path], PUBLISHED)
    html = page(report, *plots_of(report.parts))
    assert html.count("onelaunch[bench]") == 1
    assert "<svg" not in html


def test_a_second_run_is_compared_with_the_first(monkeypatch, tmp_path):
    """Statement by statement; what only one run or one device has is counted, and no verdict."""

    def findings(record):
        second = record["commit"] == "second"
        statements = [
            finding("refuted" if second else "confirmed", ours="2 us" if second else "1 us"),
            finding(claim="the same"),
        ]
        return statements if second else [*statements, finding(claim="the first run's alone")]

    invent(monkeypatch, findings=findings)
    write(tmp_path / "first", record(), record(device=GPU))
    write(tmp_path / "second", record(commit="second"))
    report = gather([tmp_path / "first"], PUBLISHED, again=[tmp_path / "second"])
    html, text = both(report, tmp_path)
    assert len(report.parts) == 2
    for made in (section(html, "again"), text):
        assert "1 record was made a second time" in made
        assert (
            "of 2 statements 1 have the same verdict again, 1 another, 1 of these the opposite"
            in made
        )
    line = next(line for line in text.splitlines() if line.startswith("| made-up"))
    assert [cell.strip() for cell in line.strip("|").split("|")][2:] == ["2", "1", "1", "1"]
    line = next(line for line in text.splitlines() if "2 us" in line)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["a call costs", CPU, "1 us", "confirmed", "2 us", "refuted"]
    assert 'href="#again"' in html
    assert 'id="again"' not in page(gather([tmp_path / "first"], PUBLISHED))


@pytest.mark.parametrize(
    ("ratio", "text"),
    [(None, "-"), (float("nan"), "-"), (0, "0.00x"), (0.0123, "0.012x"), (1.5, "1.50x")],
)
def test_a_ratio_as_it_is_read(ratio, text):
    assert times(ratio) == text


def test_the_kept_results_are_of_the_kept_records():
    """`make results` writes them."""
    pytest.importorskip("coremltools")  # without it some experiments' tables cannot be made
    kept = ROOT / "docs/results.md"
    made = document(gather([RECORDS], again=[AGAIN]), kept.parent)
    assert kept.read_text(encoding="utf-8") == made, "docs/results.md is old: run make results"
    assert made.isascii()
    assert "/tmp" not in made
    for link in re.findall(r"\]\(([^)]+)\)", made):
        assert (kept.parent / link).is_file(), link
