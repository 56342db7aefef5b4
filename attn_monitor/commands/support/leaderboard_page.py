"""The page of `leaderboard`: a table that a click sorts, and a chart for each metric with the curves of all runs.

One HTML file without outside resources. It reads without JavaScript too, which only sorts.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from attn_monitor.draw.charts import distinct_labels

Line = Sequence[tuple[int, float]]
"""Points (step, value) in order of steps."""

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")
"""Paul Tol's bright scheme, safe for colour-blind readers; further runs have the same colours, dashed."""

DASHES = ("", "6 3", "2 3")
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 420, 220, 52, 26, 10, 24  # of a chart, in pixels

STYLE = """
:root { color-scheme: light dark; font: 15px/1.4 system-ui, sans-serif; }
body { margin: 1.5rem; }
h1 { font-size: 1.3rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { padding: .3rem .7rem; text-align: left; border-bottom: 1px solid #8886; }
td:first-child { white-space: nowrap; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
th button { font: inherit; font-weight: 600; background: none; border: 0; padding: 0; cursor: pointer; color: inherit; }
th[aria-sort=ascending] button::after { content: " ▲" / ""; }
th[aria-sort=descending] button::after { content: " ▼" / ""; }
.charts { display: flex; flex-wrap: wrap; gap: 1rem; margin-top: 1.5rem; }
svg { max-width: 100%; height: auto; }
svg text { fill: currentColor; font: 12px system-ui, sans-serif; }
svg polyline { fill: none; stroke-width: 2; }
.frame { fill: none; stroke: #8886; }
.key { display: inline-block; width: 1.6rem; height: .7rem; margin-right: .4rem; vertical-align: middle; }
"""

SORT = """
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, body = document.querySelector("tbody"), column = head.cellIndex;
    const down = head.getAttribute("aria-sort") !== "descending";
    const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
    const rank = (a, b) => {
      const [x, y] = [value(a), value(b)];
      if (!x || !y) return !x - !y;
      const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return down ? -order : order;
    };
    body.append(...[...body.rows].sort(rank));
    for (const other of document.querySelectorAll("th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
  });
}
"""


def leaderboard_page(
    titles: Sequence[str], rows: Sequence[Sequence[str]], curves: Mapping[str, Mapping[str, Line]], note: str
) -> str:
    """Return the page.

    Args:
        titles: of the table's columns; the first column holds the names of runs.
        rows: texts, one for each column.
        curves: by metric, then by run.
        note: a sentence above the table.
    """
    looks = {row[0]: look(number) for number, row in enumerate(rows)}
    head = "".join(f'<th scope="col"><button type="button">{html.escape(title)}</button></th>' for title in titles)
    body = "\n".join(f"<tr>{_name(row[0], looks)}{''.join(map(_cell, row[1:]))}</tr>" for row in rows)
    charts = "\n".join(chart(metric, lines, looks) for metric, lines in curves.items() if any(lines.values()))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{len(rows)} runs</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{len(rows)} runs</h1>
<p>{html.escape(note)}</p>
<div class="wide">
<table>
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody>
</table>
</div>
<div class="charts">
{charts}
</div>
<script>{SORT}</script>
</body>
</html>
"""


def look(number: int) -> str:
    """Return the SVG attributes of the curve of a run, by its place in the table."""
    dash = DASHES[number // len(COLOURS) % len(DASHES)]
    return f'stroke="{COLOURS[number % len(COLOURS)]}"' + (f' stroke-dasharray="{dash}"' if dash else "")


def chart(metric: str, lines: Mapping[str, Line], looks: Mapping[str, str]) -> str:
    """Return an SVG chart of one metric, with each run's curve as wide as its steps."""
    steps = [step for line in lines.values() for step, _ in line]
    values = [value for line in lines.values() for _, value in line]
    first, last, low, high = min(steps), max(steps), min(values), max(values)
    lowest, highest = distinct_labels(low, high)
    right, bottom, title = WIDTH - RIGHT, HEIGHT - BOTTOM, html.escape(metric.replace("_", " "))
    margin = 0.04 * (high - low) or 0.5

    def place(step: int, value: float) -> str:
        x = LEFT + (step - first) / max(1, last - first) * (right - LEFT)
        y = bottom - (value - low + margin) / (high - low + 2 * margin) * (bottom - TOP)
        return f"{x:.1f},{y:.1f}"

    drawn = "\n".join(
        f'<polyline {looks[run]} points="{" ".join(place(*point) for point in line)}"><title>{html.escape(run)}</title>'
        "</polyline>"
        for run, line in lines.items()
        if line
    )
    return f"""<svg width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">
<rect class="frame" x="{LEFT}" y="{TOP}" width="{right - LEFT}" height="{bottom - TOP}"/>
<text x="{LEFT}" y="{TOP - 8}" font-weight="600">{title}</text>
<text x="{LEFT - 4}" y="{TOP + 12}" text-anchor="end">{highest}</text>
<text x="{LEFT - 4}" y="{bottom}" text-anchor="end">{lowest}</text>
<text x="{LEFT}" y="{HEIGHT - 7}">{first:,}</text>
<text x="{right}" y="{HEIGHT - 7}" text-anchor="end">step {last:,}</text>
{drawn}
</svg>"""


def _name(name: str, looks: Mapping[str, str]) -> str:
    line = f'<path d="M0 4H24" stroke-width="4" {looks[name]}/>'
    return f'<td><svg class="key" viewBox="0 0 24 8" aria-hidden="true">{line}</svg>{html.escape(name)}</td>'


def _cell(text: str) -> str:
    plain = text.replace(",", "")
    try:
        float(plain)
    except ValueError:
        return f"<td>{html.escape(text)}</td>"
    return f'<td class="n" data-value="{plain}">{text}</td>'
