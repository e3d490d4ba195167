"""A report as tables: for the terminal, in Markdown, and every number as CSV."""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Sequence
from typing import NamedTuple

from rich.table import Table

from mteditflow._text import escape_controls, escape_markup
from mteditflow.evaluation.intervals import PER_SAMPLE
from mteditflow.evaluation.provenance import Provenance
from mteditflow.evaluation.report import Estimate, Report
from mteditflow.evaluation.tabulation import ALL, BY_TYPE, DROP
from mteditflow.metrics import FEW_CASES

TITLES = {
    "instruction_following": "IF, %",
    "marginal": "Marginal, %",
    "content_consistency": "CC (corpus average), %",
    PER_SAMPLE: "CC (per-sample average), %",
    "overall": "Overall, %",
}


FEW = " *"  # marks an estimate over few cases
FEW_NOTE = f"*: over fewer than {FEW_CASES} cases, so the interval is rough."
INTERVALS = (
    "95% intervals over chains: Wilson's for IF and Marginal, Newcombe's for their paired "
    "differences (not for a difference of two of those), bootstrap for the others. Where all "
    "chains are alike, that of CC is of a bounded mean, and that of Overall of its parts."
)
NO_SPREAD = "none: all {} alike"
NO_SPREAD_NOTE = (
    "[none] stands where all chains are alike in scores of an unknown range: that is no certainty."
)


# Characters and places at which Markdown begins code, emphasis, a link or a column.
ACTIVE = re.compile(r"[\\`*|~]|(?<!\w)_|_(?!\w)|\](?=[\[(])")


class Grid(NamedTuple):
    """A table before it is set."""

    title: str
    head: list[str]
    body: list[list[str]]


def grids(report: Report, *, digits: int = 2) -> list[Grid]:
    """Lay out a report: all chains by turn, each edit type by turn, and the checks of success.

    Args:
        report: what to lay out.
        digits: of numbers behind the point.

    Example:
        >>> from mteditflow.evaluation.report import Estimate
        >>> numbers = [Estimate(metric="marginal", edit_type=None, turn=turn, estimate=50.0,
        ...     low=40.0, high=60.0, count=9) for turn in (1, 2, "drop")]
        >>> report = Report(title="x", turns=2, asked=9, scored=9, left_out={}, lost={},
        ...     estimates=numbers, notes=())
        >>> grids(report)[0].body[0][2:]
        ['50.00 [40.00, 60.00] *', '50.00 [40.00, 60.00] *', '9']
    """
    steps: list[int | str] = list(range(1, report.turns + 1))
    several = report.turns > 1  # else nothing to fall from, and no sum beside the turn
    rows = []
    for metric in report.metrics:
        found = [report.find(metric, turn) for turn in [*steps, *[DROP] * several]]
        counts = _counts(found[: len(steps)])
        rows.append([TITLES.get(metric, metric), *(_cell(x, digits) for x in found), counts])
    turns = [f"turn {turn}" for turn in steps]
    fall = [f"drop 1 to {report.turns}"] * several
    tables = [Grid("All chains", ["", *turns, *fall, "chains"], rows)]
    for metric in BY_TYPE if report.edit_types else ():
        rows = []
        for name in report.edit_types:
            found = [report.find(metric, turn, name) for turn in [*steps, *[ALL] * several]]
            rows.append([name, *(_cell(x, digits) for x in found), _counts(found)])
        title = f"{TITLES[metric]} by edit type"
        tables.append(Grid(title, ["", *turns, *["all turns"] * several, "turns counted"], rows))
    return [*tables, _checks(report)] if report.checks else tables


def provenance_grid(sources: Sequence[Provenance]) -> Grid:
    """Lay out who judged and who made the images, a column for each evaluation.

    Example:
        >>> provenance_grid([Provenance()]).body[0]
        ['scorer', 'unknown']
    """
    stated = [source.stated for source in sources]
    head = ["", *(["value"] if len(stated) == 1 else ["first", "second"])]
    body = [[name, *(own[name] for own in stated)] for name in stated[0]]
    return Grid("Judged and made by", head, body)


def _checks(report: Report) -> Grid:
    """Number of turns by edit type and check of success."""
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
    ends = [end for end in (x.low, x.high) if end is not None]
    values = (round(value, digits) + 0.0 for value in (x.estimate, *ends))  # no minus 0
    estimate, *shown = (f"{value:.{digits}f}" for value in values)
    return f"{estimate} [{', '.join(shown) or NO_SPREAD.format(x.count)}]{FEW * x.few}"


def _counts(found: Sequence[Estimate]) -> str:
    """Once where equal."""
    counts = list(map(str, (x.count for x in found)))
    return counts[0] if len(set(counts)) == 1 else " / ".join(counts)


def judges(report: Report) -> list[str]:
    """Return a line for each judge of a report; one line where all are the same."""
    lines = (f"Judged by: {source.judged_by}." for source in report.sources)
    return list(dict.fromkeys(lines))


def denominators(report: Report) -> str:
    """Return one line: the chains of a report, what they lost, and what there was not."""
    missing = len(report.left_out), len(report.lost)
    nothing = ", ".join(f"{name} {count}" for name, count in report.unmeasured.items())
    chains = "chain" if report.asked == 1 else "chains"
    return (
        f"{report.asked} {chains} asked, {report.scored} scored, {missing[0]} left out, "
        f"{missing[1]} lost a score"
        + (f"; turns with nothing to measure (not lost): {nothing}" if nothing else "")
    )


def reasons(report: Report) -> list[str]:
    """Name every chain that was left out or lost a score, and why, each on one line."""
    return [_one_line(f"{name}: {why}") for name, why in (report.left_out | report.lost).items()]


def rich_tables(report: Report) -> list[Table]:
    """Set the tables for a terminal."""
    tables = []
    for title, head, body in grids(report, digits=1):
        table = Table(title=escape_markup(f"{report.title}: {title} [95% interval]"))
        for column in head:
            table.add_column(escape_markup(column), justify="right" if column else "left")
        for row in body:
            table.add_row(*map(escape_markup, row))
        tables.append(table)
    return tables


def markdown(report: Report, *, pictures: Sequence[str] = ()) -> str:
    """Write the report as Markdown.

    Args:
        report: what to write.
        pictures: names of files beside it to show.
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
    r"""Escape what Markdown or HTML would act on: text of others is shown as it stands.

    Example:
        >>> print(_escaped("<img src=x> [a](http://b) a_b 3*4 | `c`"))
        &lt;img src=x&gt; [a\](http&#58;//b) a_b 3\*4 \| \`c\`
    """
    plain = html.escape(_one_line(text), quote=False).replace("://", "&#58;//")
    return ACTIVE.sub(r"\\\g<0>", plain)


def as_csv(report: Report) -> str:
    """Write every number in a row of its own; nothing stands where there is none.

    The columns after those of ``Estimate`` say who judged and who made the images, the same in
    every row; of a comparison they begin with ``first_`` and ``second_``.
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
    """Name what does not count, so many at most, the rest as a number."""
    named = reasons(report)
    more = [f"... and {len(named) - most} more"] if len(named) > most else []
    return named[:most] + more
