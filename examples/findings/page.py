"""The page of a study: the paper's findings, our results, and verdicts by a fixed rule."""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path

from mteditflow.training.report import PACKAGES

from .figures import draw_finding, draw_long
from .results import TITLES, Results, long_claims, with_range
from .running import Ablations
from .study import EIGHT, Claim, Finding


def write_page(ablations: Ablations, docs: Path, *, command: str) -> Path:
    """Write the study's page and figures from the complete seeds; return the page's path."""
    results, study = Results.read(ablations), ablations.study
    docs.mkdir(parents=True, exist_ok=True)
    for finding in study.findings:
        draw_finding(results, finding, docs / _picture(results, finding))
    if study.longer is not None:
        draw_long(results.long, docs / _picture(results, study.longer))
    page = docs / f"{study.name}.md"
    page.write_text(document(results, ablations, command=command), encoding="utf-8")
    return page


def document(results: Results, ablations: Ablations, *, command: str) -> str:
    """Return the page as Markdown."""
    study = results.study
    lines = [
        f"# {study.title}",
        "",
        *([study.answer, ""] if study.answer else []),
        f"Output of `{command}`. It writes all numbers and verdicts; only the sentences after "
        '"Why" are written by hand, in `examples/findings/`.',
        "",
        *_method(results, ablations),
        "",
        "| finding | claim | difference | verdict |",
        "|---|---|---|---|",
        *_overview(results),
    ]
    for finding in study.findings:
        lines += ["", f"## {finding.title}", "", *_section(results, finding)]
    if study.longer is not None:
        lines += ["", f"## {study.longer.title}", "", *_long(results, study.longer)]
    return "\n".join([*lines, ""])


def made_with(ablations: Ablations) -> str:
    """Return the days of the evaluations, and the versions that write the page."""
    days = sorted(
        {date.fromtimestamp(p.stat().st_mtime) for p in ablations.folder.glob("*/after*")}
    )
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return (
        f"Runs of {' to '.join(dict.fromkeys(str(d) for d in (days[0], days[-1])))}. Page written "
        f"with python {platform.python_version()}, {versions}."
    )


def _method(results: Results, ablations: Ablations) -> list[str]:
    form, seeds = ablations.form, ablations.complete_seeds()
    settings, claims = len(results.study.settings), len(list(_overview(results)))
    low, high = results.error_range
    single = "" if math.isnan(low) else f" (in single settings {low:.1f} to {high:.1f} points)"
    return [
        f"- {made_with(ablations)}",
        f"- Seeds {', '.join(map(str, seeds))}, {settings} settings: {settings * len(seeds)} runs "
        f"of {form.rounds} rounds, {results.minutes:.0f} minutes of training on one thread each. "
        f"Missing: {len(ablations.missing())} of {ablations.total} runs; a seed counts when all "
        "its settings are there. "
        f"The base run is {results.study.about}. Equal settings are one run.",
        f"- Each run is evaluated by the exact rewards on {results.chains} held-out chains of "
        "three turns, each from its own noise, the same for all settings of a seed; seeds differ "
        "in chains, adapters and noise.",
        "- Percent at turn 3. IF(3): all three turns succeeded. Marginal(3): the third did. "
        "Overall(3) = sqrt(IF(3) CC(3)).",
        "- Means: in parentheses the lowest and the highest seed. Differences: paired by seed, 95% "
        "t-intervals with the error pooled over all settings (randomized blocks; seeds are the "
        "blocks). A bootstrap over three seeds is too narrow, and a t-interval of three "
        "differences alone is 4.3 standard errors to each side. The pooled error assumes that "
        f"Overall(3) varies equally in all settings{single}: the figures show every seed. No "
        f"correction is made for the number of claims: of {claims} claims without any difference, "
        f"{0.025 * claims:.1f} would be seen on average.",
        "- Over chains alone: 95% bootstrap intervals of the same differences over the held-out "
        "chains of these seeds. They measure the uncertainty of these runs, not of other seeds, so "
        "they do not decide: a finding must hold for seeds that were not run.",
        "- Verdict: *seen* if the interval of the claimed difference lies above 0 (or above minus "
        "the claim's margin), *reversed* if below, else *not separated*.",
        f"- Var(IF) / Var(CC) inside groups, base runs, median over rounds: "
        f"{results.variance_ratio:.1f}.",
        "- In the figures: dots are seeds, squares their means, dotted lines the untrained model.",
    ]


def _overview(results: Results) -> Iterator[str]:
    for finding in results.study.findings:
        for claim in finding.claims:
            gain, topic = results.claim(finding, claim), re.split("[:,;]", finding.title)[0]
            verdict = gain.above(-claim.margin)
            yield f"| {topic} | {_in_words(claim)} | {gain:+.1f} | **{verdict}** |"
    for name, gain in long_claims(results.long).items() if results.long else ():
        yield f"| Longer chains | {name}: after > before | {gain:+.1f} | **{gain.verdict}** |"


def _claims(results: Results, finding: Finding) -> Iterator[str]:
    for claim in finding.claims:
        gain, (low, high) = results.claim(finding, claim), results.over_chains(finding, claim)
        cells = [_in_words(claim), f"{gain:+.1f}", f"[{low:+.1f}, {high:+.1f}]"]
        yield f"| {' | '.join(cells)} | **{gain.above(-claim.margin)}** |"


def _in_words(claim: Claim) -> str:
    less = f" - {claim.margin:g}" if claim.margin else ""
    return f"{TITLES[claim.metric]}: {claim.higher} > {claim.lower}{less}"


def _section(results: Results, finding: Finding) -> list[str]:
    names = list(TITLES)
    lines = [f"**Paper.** {finding.paper}", ""] if finding.paper else []
    if finding.note:
        lines += [finding.note, ""]
    lines += [
        f"![{finding.title}]({_picture(results, finding)})",
        "",
        f"| setting | {' | '.join(TITLES.values())} | Overall(3) before | Overall(3), "
        "difference to base | seconds a round |",
        f"|---|{'---|' * (len(names) + 3)}",
    ]
    for setting in finding.settings:
        base = results.study.base
        same = setting.name == base.name
        cells = [with_range(results.values(setting, name)) for name in names]
        cells.append(f"{results.before(setting, 'overall'):.1f}")
        cells.append("base" if same else f"{results.difference(setting, base):+.1f}")
        seconds = results.seconds(setting)
        cells.append(f"{seconds:.1f}" if seconds else "")
        lines.append(f"| {setting.label} | {' | '.join(cells)} |")
    lines += ["", "**Result.**", "", "| claim | difference | over chains alone | verdict |"]
    lines += ["|---|---|---|---|"]
    lines += _claims(results, finding)
    return [*lines, "", f"**Why.** {finding.why}"] if finding.why else lines


def _long(results: Results, longer: Finding) -> list[str]:
    rows = {}
    for when in ("before", "after"):
        runs = [getattr(run, when).estimates for run in results.long]
        for metric in ("marginal", "content_consistency", "overall"):
            turns = zip(*(run[metric] for run in runs), strict=True)
            rows[f"{metric.replace('_', ' ')}, {when}"] = [sum(x) / len(x) for x in turns]
    lines = [
        f"**Paper.** {longer.paper}",
        "",
        f"![Longer chains]({_picture(results, longer)})",
        "",
        f"| mean over seeds, by turn | {' | '.join(map(str, range(1, EIGHT.turns + 1)))} |",
        f"|---|{'---|' * EIGHT.turns}",
    ]
    lines += [f"| {name} | {' | '.join(f'{x:.1f}' for x in row)} |" for name, row in rows.items()]
    lines += ["", "**Result.** After minus before, t-intervals over seeds:", ""]
    lines += ["| measure | difference | verdict |", "|---|---|---|"]
    for name, gain in long_claims(results.long).items():
        lines.append(f"| {name} | {gain:+.1f} | **{gain.verdict}** |")
    return [*lines, "", f"**Why.** {longer.why}"]


def _picture(results: Results, finding: Finding) -> str:
    return f"{results.study.name}_{finding.name}.png"
