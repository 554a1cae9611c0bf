"""Our Markdown as HTML: every form it has, and nothing of a record's text taken for markup."""

from html.parser import HTMLParser

import pytest

from onelaunch.bench.core.tables import markdown
from onelaunch.bench.report.convert import cell, inline, number_of, to_html


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("# One", "<h3>One</h3>"),
        ("## Two, `code`", "<h4>Two, <code>code</code></h4>"),
        ("###### Six", "<h6>Six</h6>"),
        ("two\nlines\n\nand more\n", "<p>two lines</p>\n<p>and more</p>"),
        ("- one\n- **two**", "<ul><li>one</li><li><strong>two</strong></li></ul>"),
        ("#hash\n-1 is less", "<p>#hash -1 is less</p>"),
        ("| no table", "<p>| no table</p>"),
        ("a paragraph\n- a list", "<p>a paragraph</p>\n<ul><li>a list</li></ul>"),
    ],
)
def test_blocks(text, html):
    assert to_html(text, 3) == html


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("1 < 2 & \"3\" > '0'", "1 &lt; 2 &amp; &quot;3&quot; &gt; &#x27;0&#x27;"),
        ("`**a** <b>`, **c**", "<code>**a** &lt;b&gt;</code>, <strong>c</strong>"),
        ("[the log](../log.md)", '<a href="../log.md">the log</a>'),
        ("[a](https://b.org/c?d=1&e)", '<a href="https://b.org/c?d=1&amp;e">a</a>'),
        ("[a](javascript:alert)", "[a](javascript:alert)"),
        ("[a](JavaScript:alert)", "[a](JavaScript:alert)"),
        ('[a](b"onclick="c)', '<a href="b&quot;onclick=&quot;c">a</a>'),
        ("2 * 3 ** 4, `", "2 * 3 ** 4, `"),
        ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
        ("a \\| b", "a | b"),
    ],
)
def test_lines(text, html):
    assert inline(text) == html


class Cells(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.rows, self.open = [], False
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.open = True

    def handle_endtag(self, tag):
        self.open = self.open and tag not in ("td", "th")

    def handle_data(self, data):
        if self.open:
            self.rows[-1][-1] += data


def test_a_table_keeps_every_cell():
    header = ["n", "us", "", "x"]
    lines = [["a < b", "1,234", "-", "2.50x"], ["", "&", "12.3%", "**1**"]]
    html = to_html(markdown(header, lines))
    assert Cells(html).rows == [header, lines[0], ["", "&", "12.3%", "1"]]
    assert '<td data-n="1234">1,234</td>' in html
    assert 'class="words"' not in html


def test_a_table_of_words_stands_to_the_left():
    assert 'class="words"' in to_html("| a | b |\n| - | - |\n| c | d |")


@pytest.mark.parametrize(
    ("line", "cells"),
    [
        ("| a |", ["a", ""]),
        ("| a | b | c |", ["a", "b | c"]),
        ("| a \\| b | c |", ["a | b", "c"]),
    ],
)
def test_a_line_has_as_many_cells_as_the_header(line, cells):
    assert Cells(to_html(f"| x | y |\n| - | -: |\n{line}")).rows[1] == cells


def test_what_markdown_writes_is_a_table_however_narrow():
    assert markdown(["a", "n"], [["b", "1"]]).splitlines()[1] == "| -- | -: |"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,234", 1234), ("12.3%", 12.3), ("3.4x", 3.4), ("-0.5%", -0.5), ("+78.5", 78.5),
        ("1.0e-03, 6e-07", 1e-3), ("35.3 (12)", 35.3), ("0.030-0.041", 0.03), ("4.21*", 4.21),
        ("**1,152**", 1152), ("0.71 to 0.82", 0.71), ("12 layers", 12), ("< 0.1", 0.1), ("7", 7),
        ("-", None), ("", None), ("4096x64", None), ("64/128", None), ("2026-11-22", None),
        ("4c42a3d", None), ("2.11.0", None), ("K 82", None), ("made", None), ("nan", None),
    ],
)  # fmt: skip
def test_what_a_cell_is_sorted_by(text, number):
    assert number_of(text) == number


def test_a_cell_says_its_number_only_where_its_text_does_not():
    assert cell("99") == "<td>99</td>"
    assert cell("12.3%") == '<td data-n="12.3">12.3%</td>'
    assert cell("123,456,789") == '<td data-n="123456789">123,456,789</td>'
    assert cell("-") == "<td>-</td>"
