"""Tables of a report for the terminal and in Markdown, and all its numbers as CSV."""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from rich.table import Table

from mteditflow._text import escape_controls, escape_markup
from mteditflow.evaluation.intervals import COLLAPSE, PER_SAMPLE, WEAR
from mteditflow.evaluation.provenance import Provenance
from mteditflow.evaluation.report import Estimate, Report
from mteditflow.evaluation.tabulation import (
    ALL,
    BY_TYPE,
    DROP,
    MEAN,
    MEDIAN,
    SURVIVAL,
    SURVIVED,
    turns_shown,
)
from mteditflow.metrics import FEW_CASES

TITLES = {
    "instruction_following": "IF(k) = SR@k, %",
    "marginal": "Marginal, %",
    "content_consistency": "CC (corpus average), %",
    PER_SAMPLE: "CC (per-sample average), %",
    "overall": "Overall, %",
    COLLAPSE: "Collapse CR@k, %",
    SURVIVAL: "Survival, %",
}
FINE = {WEAR: 2}  # additional digits of metrics with small values


FEW = " *"  # marks an estimate over few cases
FEW_NOTE = f"*: over fewer than {FEW_CASES} cases, so the interval is rough."
INTERVALS = (
    "95% intervals over chains: Wilson's for IF, Marginal and CR, Newcombe's for their paired "
    "differences (not for a difference of two of those), Greenwood's for survival, bootstrap for "
    "the others. Where all chains are alike, that of CC is of a bounded mean, and that of Overall "
    "of its parts."
)
NO_SPREAD = "none: all {} alike"
NO_SPREAD_NOTE = (
    "[none] stands where all chains are alike in scores of an unknown range: that is no certainty."
)


# Characters and positions at which Markdown starts code, emphasis, a link or a table column.
ACTIVE = re.compile(r"[\\`*|~]|(?<!\w)_|_(?!\w)|\](?=[\[(])")


class Grid(NamedTuple):
    """Content of a table, independent of its output format."""

    title: str
    head: list[str]
    body: list[list[str]]


def grids(report: Report, *, digits: int = 2) -> list[Grid]:
    """Return the tables of a report: all chains by turn, edit types by turn, checks of success.

    With more than 8 turns only those of ``turns_shown`` are in the tables; JSON and CSV have all.
    Survival has its own row only if it differs from IF, which happens when turns were lost.

    Args:
        report: report to show.
        digits: decimal digits of the numbers.

    Example:
        >>> from mteditflow.evaluation.report import Estimate
        >>> numbers = [Estimate(metric="marginal", edit_type=None, turn=turn, estimate=50.0,
        ...     low=40.0, high=60.0, count=9) for turn in (1, 2, "drop")]
        >>> report = Report(title="x", turns=2, asked=9, scored=9, left_out={}, lost={},
        ...     estimates=numbers, notes=())
        >>> grids(report)[0].body[0][2:]
        ['50.00 [40.00, 60.00] *', '50.00 [40.00, 60.00] *', '9']
    """
    steps: list[int | str] = [*turns_shown(report.turns)]
    several = report.turns > 1  # a single turn has no drop, and no average besides itself
    rows = []
    for metric in report.metrics:
        found = [report.find(metric, turn) for turn in [*steps, *[DROP] * several]]
        counts = _counts(found[: len(steps)])
        rows.append([TITLES.get(metric, metric), *(_cell(x, digits) for x in found), counts])
    if _survival_differs(report):
        found = [report.find(SURVIVAL, turn) for turn in steps]
        cells = [*(_cell(x, digits) for x in found), *[""] * several]
        rows.insert(1, [TITLES[SURVIVAL], *cells, _counts(found)])
    turns = [f"turn {turn}" for turn in steps]
    fall = [f"drop 1 to {report.turns}"] * several
    cut = f", some of {report.turns} turns" * (len(steps) < report.turns)
    tables = [Grid(f"All chains{cut}", ["", *turns, *fall, "chains"], rows)]
    if report.has_survival and several:
        found = [report.find(SURVIVED, name) for name in (MEAN, MEDIAN)]
        row = ["turns survived", *(_cell(x, digits) for x in found), _counts(found)]
        title = f"Turns before the first failure, of {report.turns}"
        tables.append(Grid(title, ["", MEAN, MEDIAN, "chains"], [row]))
    for metric in BY_TYPE if report.edit_types else ():
        rows = []
        for name in report.edit_types:
            found = [report.find(metric, turn, name) for turn in [*steps, *[ALL] * several]]
            rows.append([name, *(_cell(x, digits) for x in found), _counts(found)])
        title = f"{TITLES[metric]} by edit type"
        tables.append(Grid(title, ["", *turns, *["all turns"] * several, "turns counted"], rows))
    return [*tables, _checks(report)] if report.checks else tables


def _survival_differs(report: Report) -> bool:
    """Whether survival differs from IF at some turn: scores were lost, or chains differ in length.

    Differences up to 0.001 percentage points are rounding.
    """
    if not report.has_survival:
        return False
    pairs = (
        (report.find(x, t).estimate for x in (SURVIVAL, BY_TYPE[0]))
        for t in range(1, report.turns + 1)
    )
    return any(a != b and (a is None or b is None or abs(a - b) > 1e-3) for a, b in pairs)


def provenance_grid(sources: Sequence[Provenance]) -> Grid:
    """Return a table of the provenance, one column for each evaluation.

    Example:
        >>> provenance_grid([Provenance()]).body[0]
        ['scorer', 'unknown']
    """
    stated = [source.stated for source in sources]
    head = ["", *(["value"] if len(stated) == 1 else ["first", "second"])]
    body = [[name, *(own[name] for own in stated)] for name in stated[0]]
    return Grid("Judged and made by", head, body)


def _checks(report: Report) -> Grid:
    """Return a table of the number of turns by edit type and check of success."""
    ways = sorted({way for used in report.checks.values() for way in used})
    body = [
        [name, *(str(used.get(way, 0)) for way in ways)] for name, used in report.checks.items()
    ]
    return Grid("Check of success, in turns", ["", *ways], body)


def checks_in_short(report: Report) -> str:
    """Return one line: the number of turns by edit type and check of success."""
    told = (
        f"{name}: " + ", ".join(f"{way} {count}" for way, count in used.items())
        for name, used in report.checks.items()
    )
    return f"Turns of {report.title} by check of success: {'; '.join(told) or 'not known'}."


def _cell(x: Estimate, digits: int) -> str:
    if x.estimate is None:
        return "none"
    digits += x.metric not in TITLES  # in its own unit, which is seldom percent
    digits += FINE.get(x.metric, 0)
    ends = [end for end in (x.low, x.high) if end is not None]
    values = (round(value, digits) + 0.0 for value in (x.estimate, *ends))  # no minus 0
    estimate, *shown = (f"{value:.{digits}f}" for value in values)
    return f"{estimate} [{', '.join(shown) or NO_SPREAD.format(x.count)}]{FEW * x.few}"


def _counts(found: Sequence[Estimate]) -> str:
    """Return the denominators of a row, joined by slashes, or one number if all are equal."""
    counts = list(map(str, (x.count for x in found)))
    return counts[0] if len(set(counts)) == 1 else " / ".join(counts)


def judges(report: Report) -> list[str]:
    """Return one line for each different judge of a report."""
    lines = (f"Judged by: {source.judged_by}." for source in report.sources)
    return list(dict.fromkeys(lines))


def denominators(report: Report) -> str:
    """Return one line: chains asked, scored, left out and with lost scores, turns unmeasured."""
    missing = len(report.left_out), len(report.lost)
    nothing = ", ".join(f"{name} {count}" for name, count in report.unmeasured.items())
    chains = "chain" if report.asked == 1 else "chains"
    return (
        f"{report.asked} {chains} asked, {report.scored} scored, {missing[0]} left out, "
        f"{missing[1]} lost a score"
        + (f"; turns with nothing to measure (not lost): {nothing}" if nothing else "")
    )


def reasons(report: Report) -> list[str]:
    """Return one line for every chain that was left out or lost a score, with the reason."""
    return [_one_line(f"{name}: {why}") for name, why in (report.left_out | report.lost).items()]


def rich_tables(report: Report) -> list[Table]:
    """Return the tables for a terminal, with one decimal digit."""
    tables = []
    for title, head, body in grids(report, digits=1):
        table = Table(title=escape_markup(f"{report.title}: {title} [95% interval]"))
        for column in head:
            side: Literal["left", "right"] = "right" if column else "left"
            table.add_column(escape_markup(column), justify=side, overflow="fold")
        for row in body:
            table.add_row(*map(escape_markup, row))
        tables.append(table)
    return tables


def markdown(report: Report, *, pictures: Sequence[str] = ()) -> str:
    """Return the report as Markdown.

    Args:
        report: report to show.
        pictures: names of image files in the same folder to embed.
    """
    parts = [f"# {_escaped(report.title)}", f"{denominators(report)}. {INTERVALS}"]
    parts += [FEW_NOTE] * any(x.few for x in report.estimates)
    parts += [NO_SPREAD_NOTE] * any(x.alike for x in report.estimates)
    parts += map(_escaped, report.notes)
    sources = [provenance_grid(report.sources)] if report.sources else []
    sources = [
        grid._replace(body=[[name, *map(_escaped, cells)] for name, *cells in grid.body])
        for grid in sources
    ]
    for title, head, body in [*grids(report), *sources]:
        named = [[_escaped(name), *cells] for name, *cells in body]
        lines = [[*map(_escaped, head)], ["---", *["---:"] * (len(head) - 1)], *named]
        parts += [f"## {title}", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    parts += [f"![{name}]({name})" for name in pictures]
    if report.left_out or report.lost:
        lines_out = "\n".join(f"- {_escaped(line)}" for line in reasons(report))
        parts += ["## Left out or lost", lines_out]
    return "\n\n".join(parts) + "\n"


def _one_line(text: str) -> str:
    return escape_controls(" ".join(text.split()))


def _escaped(text: str) -> str:
    r"""Escape Markdown and HTML, so that text from data files is shown literally.

    Example:
        >>> print(_escaped("<img src=x> [a](http://b) a_b 3*4 | `c`"))
        &lt;img src=x&gt; [a\](http&#58;//b) a_b 3\*4 \| \`c\`
    """
    # The colon as an entity keeps Markdown from turning a bare URL into a link.
    plain = html.escape(_one_line(text), quote=False).replace("://", "&#58;//")
    return ACTIVE.sub(r"\\\g<0>", plain)


def as_csv(report: Report) -> str:
    """Return every number as a row of CSV, with empty cells for missing values.

    The columns after those of ``Estimate`` are the provenance, the same in every row; in a
    comparison their names begin with ``first_`` and ``second_``.
    """
    ends = ("",) if len(report.sources) == 1 else ("first_", "second_")
    source = {
        f"{end}{name}": value
        for end, own in zip(ends, report.sources, strict=False)
        for name, value in own.stated.items()
    }
    table = io.StringIO()
    fields = [*Estimate.model_fields, *source]
    writer = csv.DictWriter(table, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(x.model_dump() | source for x in report.estimates)
    return table.getvalue()


def lost_in_short(report: Report, *, most: int = 20) -> list[str]:
    """Return at most ``most`` of the lines of ``reasons``, and the number of further ones."""
    named = reasons(report)
    more = [f"... and {len(named) - most} more"] if len(named) > most else []
    return named[:most] + more
