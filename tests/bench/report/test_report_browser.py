"""The report in a real browser, without a head: CHROME names one, or chromium is on the PATH."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from onelaunch.bench.report.gather import gather
from onelaunch.bench.report.html import page
from onelaunch.bench.report.svg import plots_of, story_plots
from tests.bench.report.reports import GPU, PUBLISHED, finding, invent, record, table, write

RECORDS = Path(__file__).parents[3] / "benchmarks/records"
pytestmark = pytest.mark.extended
NAMES = ("chromium", "chromium-browser", "google-chrome")
MOST_BYTES = 2_000_000
# One of them is in the text of every plot.
UNITS = (
    r"\b(us|ms|s|seconds|MB|GB|megabytes|bytes|kB|nats|tokens|steps|x)\b|%|/s|relative|over|times"
)

_LISTEN = """<script>
const failures = [];
addEventListener("error", (event) => failures.push(String(event.message)), true);
addEventListener("unhandledrejection", (event) => failures.push(String(event.reason)));
addEventListener("securitypolicyviolation", (event) => failures.push(event.violatedDirective));
</script>"""
_CHECK = """<script>
addEventListener("load", () => {
  const loaded = performance.now();
  let result;
  try {
    result = (() => { %s })();
  } catch (error) {
    failures.push(String(error));
  }
  const answer = document.createElement("script");
  answer.type = "application/json";
  answer.id = "answer";
  answer.textContent = JSON.stringify({ loaded, failures, result }).replaceAll("<", "\\\\u003c");
  document.body.append(answer);
});
</script>"""


@pytest.fixture
def seen(tmp_path):
    """Opens a page, runs a check in it; returns its result."""
    browser = os.environ.get("CHROME") or next(filter(None, map(shutil.which, NAMES)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is here, and CHROME names none")

    def opened(html, check):
        html = html.replace("<head>", f"<head>{_LISTEN}", 1)
        html = html.replace("</body>", f"{_CHECK % check}</body>")
        path = tmp_path / "page.html"
        path.write_text(html, encoding="utf-8")
        done = subprocess.run(
            [
                browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri(),
            ],
            capture_output=True, text=True, timeout=300, check=True,
        )  # fmt: skip
        _, separator, rest = done.stdout.partition('id="answer">')
        assert separator, "the check did not run"
        answer = json.loads(rest.partition("</script>")[0])
        print(f"loaded after {answer['loaded']:.0f} ms")
        assert answer["failures"] == []
        return answer["result"]

    return opened


@pytest.fixture
def made_up(monkeypatch, tmp_path):
    def findings(record):
        return [finding("refuted" if record["device"] == GPU else "confirmed")]

    invent(monkeypatch, findings=findings, table=table)
    write(tmp_path, record(), record(device=GPU), record("quickstart", GPU))
    return page(gather([tmp_path], PUBLISHED))


def test_a_click_sorts_numbers_as_numbers(seen, made_up):
    result = seen(
        made_up,
        """
        const table = document.querySelector("#made-up h3 ~ .wide table");
        const names = () => Array.from(table.tBodies[0].rows, (row) => row.cells[0].textContent);
        const orders = [names()];
        for (const column of [1, 1, 2, 2, 3, 0, 0]) {
          table.tHead.rows[0].cells[column].click();
          orders.push(names());
        }
        const headers = table.tHead.rows[0].cells;
        headers[1].dispatchEvent(new KeyboardEvent("keydown", { key: "Enter" }));
        const sorted = Array.from(headers, (header) => header.getAttribute("aria-sort"));
        return { orders: orders.map((order) => order.join("")), sorted };
        """,
    )
    by_us = ["dabc", "badc"]  # 0.001, 99, 1,234; a dash is last either way
    by_share = ["abdc", "dbac"]  # 2.5%, 12.3%, 100%
    by_speed = ["badc"]  # 0.50x, 3.4x, 10.0x
    assert result["orders"] == ["bcad", *by_us, *by_share, *by_speed, "abcd", "dcba"]
    assert result["sorted"] == [None, "ascending", None, None]


def test_a_device_is_left_out_and_comes_back(seen, made_up):
    result = seen(
        made_up,
        """
        const shown = () => Array.from(document.querySelectorAll("main [data-device]"))
          .filter((each) => each.checkVisibility())
          .map((each) => each.dataset.device);
        const filter = document.getElementById("devices");
        for (const fold of document.querySelectorAll("details")) fold.open = true;
        const box = filter.querySelector("input[value=nvidia-h200]");
        const before = shown();
        box.click();
        const without = shown();
        const quickstart = document.getElementById("quickstart").checkVisibility();
        box.click();
        return { visible: filter.checkVisibility(), before, without, quickstart, after: shown() };
        """,
    )
    assert result["visible"]
    assert result["before"] == result["after"]
    assert "nvidia-h200" in result["before"]
    assert "nvidia-h200" not in result["without"]
    assert result["without"].count("amd-epyc-2-cores") == result["before"].count("amd-epyc-2-cores")
    assert not result["quickstart"]


def test_the_page_of_the_kept_records(seen):
    """It is small, asks for nothing else, and its plots say what they show and in which unit."""
    pytest.importorskip("matplotlib")
    report = gather([RECORDS])
    plots, failed, without = plots_of(report.parts)
    assert (failed, without) == ({}, "")
    of_the_story = story_plots(report)
    assert len(of_the_story) == 3
    html = page(report, plots, failed, without, of_the_story)
    assert len(html.encode()) < MOST_BYTES
    result = seen(
        html,
        f"""
        const folded = document.querySelectorAll("main .plot, main table");
        const hidden = Array.from(folded).every((each) => !each.checkVisibility());
        for (const fold of document.querySelectorAll("details")) fold.open = true;
        // laid out though it is not near
        for (const each of document.querySelectorAll("main > section"))
          each.style.contentVisibility = "visible";
        const unit = new RegExp({json.dumps(UNITS)});
        const plots = Array.from(document.querySelectorAll(".plot"));
        const labels = (plot) => Array.from(plot.querySelectorAll("text"), (t) => t.textContent);
        return {{
          hidden,
          plots: plots.map((plot) => plot.getAttribute("aria-label")),
          unnamed: plots.filter((plot) => !labels(plot).some((text) => unit.test(text)))
            .map((plot) => plot.getAttribute("aria-label")),
          empty: plots.filter((plot) => plot.getBoundingClientRect().height < 100).length,
          budget: plots.filter((plot) => plot.ariaLabel.includes("compile-budget")).flatMap(labels),
          requests: performance.getEntriesByType("resource")
            .filter((entry) => !entry.name.startsWith("data:")).map((entry) => entry.name),
          wide: document.documentElement.scrollWidth > innerWidth,
        }};
        """,
    )
    assert result["hidden"], "the tables are folded until a reader opens them"
    assert len(result["plots"]) == len(plots) + len(of_the_story)
    assert result["unnamed"] == []
    assert result["empty"] == 0
    assert {"compilations", "memory of the process, MB"} <= set(result["budget"])
    assert result["requests"] == []
    assert not result["wide"]
