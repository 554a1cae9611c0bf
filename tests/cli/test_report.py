"""`onelaunch report`: where it writes, and what it refuses."""

import pytest

from onelaunch import cli
from tests.bench.report.reports import invent, record, write


@pytest.fixture
def report(capsys):
    def run(*argv):
        code = cli.run(["report", *map(str, argv)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "benchmarks/records", record("quickstart"))
    return tmp_path


def test_without_arguments_all_records_become_a_page(report, folder):
    assert report() == (0, "report.html\n", "")
    assert "<td>a case</td>" in (folder / "report.html").read_text()


def test_markdown_alone_is_markdown_alone(report, folder):
    assert report("--markdown", "results.md") == (0, "results.md\n", "")
    assert "](benchmarks/records/amd/quickstart.json)" in (folder / "results.md").read_text()
    assert not (folder / "report.html").exists()


def test_both_are_written_to_their_paths(report, folder):
    (path,) = write(folder / "elsewhere", record("soak-fuzz"))
    code, out, _ = report(path, "--out", "a.html", "--markdown", "b.md")
    assert (code, out) == (0, "b.md\na.html\n")
    for name in ("a.html", "b.md"):
        assert "soak-fuzz" in (folder / name).read_text()
        assert "quickstart" not in (folder / name).read_text()


@pytest.mark.parametrize(
    ("argv", "log"),
    [
        (["none.json"], "none.json: no such record"),
        (["empty"], "empty: holds no records"),
        (["bad.json"], "bad.json: not valid JSON"),
        (["--out", "none/a.html"], "none/a.html: cannot write"),
    ],
)
def test_bad_input_is_one_line(argv, log, report, folder):
    (folder / "empty").mkdir()
    (folder / "bad.json").write_text("{")
    code, out, err = report(*argv)
    assert (code, out) == (2, "")
    assert err.startswith(f"onelaunch: {log}")
    assert err.count("\n") == 1


def test_what_could_not_be_made_is_logged(report, folder, monkeypatch):
    invent(monkeypatch, table=lambda record: record["share"])
    write(folder / "old", record())
    log = "amd/made-up.json: without a table: KeyError: 'share'\n"
    assert report("old") == (0, "report.html\n", log)
    assert report("old", "--quiet") == (0, "report.html\n", "")
