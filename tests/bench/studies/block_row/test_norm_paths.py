"""The published sentence on row counts, judged on made-up records."""

from __future__ import annotations

import pytest

from onelaunch.bench.studies.block_row import rms_norm_threshold
from onelaunch.bench.studies.block_row.norm_cell import PASSES
from onelaunch.bench.studies.block_row.paths import PAIRS, ROWS, WIDTHS, ratios_of, wins_from


def record(*pairs, **odd):
    """Each pair wins by half from 4,096 rows on and loses below, but for the ratios in `odd`, by
    case, of the first pair."""
    rows = []
    for count in ROWS:
        for width in WIDTHS:
            for pass_ in PASSES:
                case = f"{count}x{width} {pass_} gpu"
                ratio = 0.5 if count >= 4096 else 1.5
                forms = {}
                for key in pairs:
                    forms[PAIRS[key].block], forms[PAIRS[key].row] = ratio, 1.0
                if case in odd:
                    forms[PAIRS[pairs[0]].block] = odd[case]
                rows.append(
                    {"case": case, "ours": ratio, "peers": {"row": 1.0}, "ratio": ratio, "n": 15}
                    | ({"forms": forms} if forms else {})
                )
    return {"device": "a device", "rows": rows}


def judged(record):
    return [(f.verdict, f.ours) for f in rms_norm_threshold.findings(record)]


def test_the_sentence_is_judged_on_the_published_tile_and_on_ligers_own_paths():
    both = rms_norm_threshold.findings(record("source", "liger"))
    assert [f.verdict for f in both] == ["confirmed"] * 2
    assert [f.ours for f in both] == ["4,096 rows"] * 2
    assert "16 rows a tile" in both[0].claim
    assert "Liger" in both[1].claim
    assert "forward from 4,096 rows on, full from 4,096 rows on" in both[0].why
    assert "do not win" not in both[0].why


def test_without_liger_only_ours_is_judged():
    assert judged(record("source")) == [("confirmed", "4,096 rows")]


def test_a_record_of_our_tuned_tiles_alone_does_not_judge_it():
    assert judged(record()) == [("not applicable", "")]


def test_a_pass_that_does_not_win_is_named():
    never = {f"{count}x512 forward gpu": 1.0 for count in ROWS}
    (finding,) = rms_norm_threshold.findings(record("source", **never))
    assert (finding.verdict, finding.ours, finding.ratio) == ("refuted", "none", None)
    assert "forward from no count on" in finding.why
    assert "backward from 4,096 rows on" in finding.why
    assert "at 4,096 rows do not win: forward at 512 (1.00)" in finding.why


@pytest.mark.parametrize(
    ("odd", "verdict", "ours"),
    [
        # a loss higher up counts; one power of two off is still the published figure
        ({"4096x64 full gpu": 0.995}, "confirmed", "8,192 rows"),
        ({"8192x64 full gpu": 1.2}, "refuted", "16,384 rows"),
        ({f"2048x{w} {p} gpu": 0.9 for w in WIDTHS for p in PASSES}, "confirmed", "2,048 rows"),
        ({"32768x128 backward gpu": 1.02}, "refuted", "none"),
    ],
)
def test_every_pass_must_win_from_there_on(odd, verdict, ours):
    assert judged(record("source", **odd)) == [(verdict, ours)]


def test_a_pass_that_was_not_timed_has_not_won():
    made = record("source")
    made["rows"] = [row for row in made["rows"] if row["case"] != "16384x256 full gpu"]
    ratios = ratios_of(made, PAIRS["source"])
    assert wins_from(ratios, PASSES, WIDTHS) == 32768
    assert wins_from(ratios, ("forward",), WIDTHS) == 4096
    assert wins_from(ratios, PASSES, (64,)) == 4096


def test_other_widths_and_row_counts_are_not_the_sentences():
    made = record("source")
    made["rows"] += [
        dict(made["rows"][0], case=f"{shape} forward gpu") for shape in ("256x64", "4096x1024")
    ]
    ratios = ratios_of(made, PAIRS["source"])
    assert set(ratios["forward"]) == {(count, width) for count in ROWS for width in WIDTHS}


def test_the_table_has_every_pair_by_pass_and_width():
    text = rms_norm_threshold.table(record("source", "liger"))
    for pair in PAIRS.values():
        assert f"## {pair.label}: wins from so many rows on" in text
    for key in ("source", "liger"):
        for pass_ in PASSES:
            assert f"### {pass_}, {PAIRS[key].label}" in text
    part = text[text.index(PAIRS["source"].label) :]
    line = next(line for line in part.splitlines() if line.startswith("| 512 "))
    assert [cell.strip() for cell in line.split("|")[2:-1]] == ["4,096"] * 4
    assert "0.50 wins" in text
    plain = rms_norm_threshold.table(record())
    assert not any(pair.label in plain for pair in PAIRS.values())
    assert text.isascii()
