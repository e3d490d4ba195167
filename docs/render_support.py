"""The table of supported pipelines: ``python -m docs.render_support`` writes support.md and .json.

It records, replays and trains every tiny pipeline of tests/pipelines/tiny_pipelines, which takes
minutes. Each check asserts. A case whose check fails, or that was recorded and is now refused,
keeps the row that it has, and the command ends with exit code 2.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers

TESTS = Path(__file__).parents[1] / "tests" / "pipelines"
sys.path.insert(0, str(TESTS))  # the worlds import each other as the tests do

from tiny_pipelines import FAMILIES, NOT_BUILT, REFUSED  # noqa: E402
from tiny_pipelines.checks import Case  # noqa: E402

from mteditflow.pipelines import Recorder  # noqa: E402

Row = dict[str, str]

PAGE = Path(__file__).parent / "support.md"
FACTS = PAGE.with_suffix(".json")
SCHEDULER = "FlowMatchEulerDiscreteScheduler"

INTRODUCTION = """\
# Supported pipelines

Made by `make support` (`python -m docs.render_support`, some minutes) with diffusers {version};
do not edit. The same facts are in [support.json](support.json). Of the {classes} pipeline classes
of that version whose modules name the flow scheduler, {recorded} are recorded and replayed, and
the others are listed with the reason; {more} more classes are recorded with it.

`Recorder` patches nothing and depends on no pipeline class. It compares tensors to find where a
call holds the noisy sample, how it passes the time, and how the outputs become the scheduler's
velocity (`mteditflow/pipelines/`: `recognize.py`, `flow_times.py`, `guidance.py`). Other pipelines
that call their transformer in one of these ways work without being listed; all others are refused
with a reason.

Each row is a tiny pipeline of the real classes, float32 on a CPU. Scheduler settings are those of
diffusers' conversion script, where it has one for the model, or like those of the published model.
Models that ship UniPC or DPMSolver++ (Wan, SkyReels, Sana) have the Euler scheduler at the same
shift; with their own, only the first and the last latents are recorded. Weights are random, and
none are zero: zero-initialized outputs would hide faults. Two turns are recorded, for each number
of trajectories. Every kind of place and guidance is also recorded in bfloat16 and in inference
mode, and must be refused when velocity, sample or prompts change at a late step
(`tests/pipelines/test_forms.py`).

- **batches**: numbers of trajectories per call that were recorded.
- **steps**: recorded steps out of those requested; a strength of 0.5 leaves half.
- **calls**: forward passes of the transformer per pipeline call.
- **how the sample lies**: the argument of the transformer that holds the noisy sample.
- **text**: the real encoders that prompts go through, or embeddings given to the call.
- **ratio**: likelihood of a replayed step over that of the recorded one. It is exactly 1 in the
  batch in which the step was sampled; "mixed" is a batch of rows of all trajectories, turns, steps.
  Inpainting changes latents between steps, so it is recorded without stochastic steps.
- **output under an ODE**: the recorded call's image or video compared with the plain call's.
- **GRPO, NFT**: three optimizer steps on LoRA adapters, on the rows of one rollout; the gradients
  are finite and not zero.

"""

REFUSALS = """
## Refused cases, with the error

"""
ABSENT = """
## Flow pipelines that are not built here

"""


def main(arguments: list[str] | None = None) -> int:
    """Run the checks and write both files; 2 where a check failed or support was lost."""
    parser = argparse.ArgumentParser(prog="render_support", description=__doc__)
    parser.add_argument(
        "--only",
        nargs="*",
        default=[""],
        help="check the cases with one of these in their names; the others keep their rows",
    )
    only = parser.parse_args(arguments).only
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # the libraries warn of tiny models
    rows, refused, failed = measure(only)
    old = json.loads(FACTS.read_text(encoding="utf-8")) if FACTS.exists() else {}
    lost = {key(row) for row in refused} & {key(row) for row in old.get("recorded", [])}
    failed += [f"no longer recorded: {', '.join(case)}" for case in sorted(lost)]
    facts = collect(rows, [row for row in refused if key(row) not in lost], old)
    if "" in only:
        failed += [f"neither row nor reason: {name}" for name in sorted(unexplained(facts))]
    FACTS.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(facts), encoding="utf-8")
    for line in failed:
        say(line)
    say(f"{len(rows)} cases recorded, {len(refused)} refused, {len(failed)} failed")
    return 2 if failed else 0


def measure(only: list[str]) -> tuple[list[Row], list[Row], list[str]]:
    """Rows of recorded cases, refused cases with their errors, and failed checks."""
    rows: list[Row] = []
    refused: list[Row] = []
    failed: list[str] = []
    for name, kind in cases(only):
        kept, row = check(name, kind)
        told = row.get("error", row.get("ratio", ""))
        say(f"{kept}: {name}, {kind}: {told}")
        if kept == "failed":
            failed.append(f"{name}, {kind}: {told}")
        else:
            (rows if kept == "recorded" else refused).append(
                {"pipeline": name, "guidance": kind} | row
            )
    options = [what for what in REFUSED if any(part in what for part in only)]
    refused += [{"pipeline": what, "guidance": "", "error": refusal(what)} for what in options]
    return rows, refused, failed


def check(name: str, kind: str) -> tuple[str, Row]:
    """Whether a case is recorded, refused or failed, with its columns or its error."""
    try:
        case = Case(FAMILIES[name], kind)
        case.plain()
    except Exception as error:
        return "failed", {"error": f"without the recorder: {one_line(error)}"}
    try:
        row = case.facts()
    except ValueError as error:  # a ReplayError, or a refusal before the first step
        return "refused", {"error": one_line(error)}
    except Exception as error:
        return "failed", {"error": f"{type(error).__name__}: {one_line(error)}"}
    try:
        return "recorded", row | case.trained()
    except Exception as error:
        return "failed", {"error": f"{type(error).__name__}: {one_line(error)}"}


def say(line: str) -> None:
    """Print a line at once, as progress: the command takes minutes."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def cases(only: Sequence[str] = ("",)) -> list[tuple[str, str]]:
    """Names and kinds of guidance of the families with one of these in their names."""
    names = [name for name in FAMILIES if any(part in name for part in only)]
    return [(name, kind) for name in names for kind in FAMILIES[name].guided]


def key(row: Row) -> tuple[str, str]:
    """The case of a row."""
    return row["pipeline"], row["guidance"]


def refusal(what: str) -> str:
    """The error of a case that must be refused, which leaves the pipeline as it was."""
    case = REFUSED[what]
    pipeline = case.build()
    scheduler, model = pipeline.scheduler, getattr(pipeline, case.model)
    told = ""
    try:
        with Recorder(pipeline, model=model):
            pipeline(**case.options, num_inference_steps=case.steps)
    except ValueError as error:
        told = one_line(error)
    assert case.reason in told, f"{what}: expected the error {case.reason!r}, got {told!r}"
    assert pipeline.scheduler is scheduler
    assert not model._forward_hooks
    return told


def one_line(error: BaseException) -> str:
    """The message without line breaks or bars, which would end a cell."""
    return re.sub(r"\s+", " ", str(error)).replace("|", "/")[:600]


def class_of(name: str) -> str:
    """The class at the beginning of a case's name."""
    return re.split(r"[ ,]", name)[0]


def flow_classes() -> set[str]:
    """Pipeline classes of the installed diffusers whose modules name the flow scheduler."""
    sources = Path(diffusers.__file__).parent.joinpath("pipelines").glob("*/pipeline_*.py")
    texts = (source.read_text(encoding="utf-8") for source in sources)
    return {
        name
        for text in texts
        if SCHEDULER in text
        for name in re.findall(r"^class (\w+Pipeline)\(", text, re.MULTILINE)
    }


def collect(rows: list[Row], refused: list[Row], old: dict[str, Any]) -> dict[str, Any]:
    """All facts of the page: those of now, and for other cases that still exist the old ones."""
    order = [*cases(), *((what, "") for what in REFUSED)]
    now = {key(row) for row in [*rows, *refused]}

    def joined(name: str, new: list[Row]) -> list[Row]:
        kept = [row for row in old.get(name, []) if key(row) not in now and key(row) in order]
        return sorted([*kept, *new], key=lambda row: order.index(key(row)))

    return {
        "diffusers": diffusers.__version__,
        "flow_classes": sorted(flow_classes()),
        "recorded": joined("recorded", rows),
        "refused": joined("refused", refused),
        "not_built": dict(sorted(NOT_BUILT.items())),
    }


def unexplained(facts: dict[str, Any]) -> set[str]:
    """Flow pipeline classes with neither a row nor a reason."""
    told = [class_of(row["pipeline"]) for row in facts["recorded"] + facts["refused"]]
    return set(facts["flow_classes"]) - set(told) - set(facts["not_built"])


def page(facts: dict[str, Any]) -> str:
    """The page with these facts."""
    recorded = {class_of(row["pipeline"]) for row in facts["recorded"]}
    flow = set(facts["flow_classes"])
    text = INTRODUCTION.format(
        version=facts["diffusers"],
        classes=len(flow),
        recorded=len(recorded & flow),
        more=len(recorded - flow),
    )
    columns = list(facts["recorded"][0])
    rows = [[f"`{row['pipeline']}`", *list(row.values())[1:]] for row in facts["recorded"]]
    text += markdown(columns, rows) + REFUSALS
    rows = [[row["pipeline"], row["guidance"], row["error"]] for row in facts["refused"]]
    text += markdown(["pipeline", "guidance", "error"], rows) + ABSENT
    absent = [[f"`{name}`", reason] for name, reason in facts["not_built"].items()]
    return text + markdown(["pipeline", "reason"], absent)


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
