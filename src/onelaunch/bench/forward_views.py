"""What the record of forward looks like as a table and as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from onelaunch.bench.tables import figure as digits
from onelaunch.bench.tables import markdown, provenance

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PEERS = ("torch.compile + graph", "torch.compile", "eager + graph", "eager")


def table(record: dict[str, Any]) -> str:
    """In Markdown: every case with its forms and peers."""
    rows = record["rows"]
    forms = list(dict.fromkeys(form for row in rows for form in row["forms"]))
    head = ["us", *forms, *PEERS, "best over best peer", "over eager", "floor"]
    body = []
    for row in rows:
        best = min(row["speedup"].values())
        cells = [row["case"]]
        for form in forms:
            each = row["forms"].get(form)
            bold = "**" if form == row["form"] else ""
            cells.append(f"{bold}{digits(each['median'])}{bold}" if each else "-")
        cells += [digits(row["peers"][peer]) for peer in PEERS]
        cells += [f"{best:.2f}x", f"{row['speedup']['eager']:.1f}x", digits(row["floor"])]
        body.append(cells)
    seconds = [
        [row["case"], *(f"{row['seconds_to_first'].get(form, 0):.2f}" for form in forms)]
        for row in rows
    ]
    parts = [
        f"# A forward of whole texts on {record['device']}",
        provenance(record),
        "Medians in us of a forward in bfloat16, logits of every position. `fused`: how much one "
        "launch holds (all, half a layer, so many layers). All but eager and torch.compile are "
        "CUDA graphs. Bold: the fastest of ours.",
        markdown(head, body),
        "## Seconds from the weights on the device to a first forward captured",
        markdown(["s", *forms], seconds),
    ]
    return "\n\n".join(parts) + "\n"


def draw(record: dict[str, Any]) -> Figure | None:
    """Bars: the forms and the peers of each case, over the fastest of ours."""
    from onelaunch.bench import plots

    rows = record["rows"]
    if not rows:
        return None
    figure = plots.new_figure(9, 4.5)
    axes = figure.subplots()
    axes.set_title("Forward of whole texts, over our fastest form")
    names = list(dict.fromkeys(form for row in rows for form in row["forms"])) + list(PEERS[:1])
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        heights, places = [], []
        for j, row in enumerate(rows):
            each = row["forms"].get(name)
            value = each["median"] if each else row["peers"].get(name)
            if value:
                heights.append(value / row["ours"])
                places.append(j + (i - len(names) / 2) * width)
        axes.bar(places, heights, width, label=name)
    axes.set_xticks(range(len(rows)), [row["case"] for row in rows], rotation=15, fontsize=7)
    axes.set_ylabel("time over that of our fastest form")
    axes.axhline(1, color="black", linewidth=0.5)
    axes.legend(fontsize=7)
    return figure
