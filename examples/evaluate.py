"""Score any editor on chains of edits: make the images, judge every turn, report with intervals.

    python examples/evaluate.py run chains.jsonl --editor black-forest-labs/FLUX.1-Kontext-dev \
        --judge http://127.0.0.1:8000/v1 --model Qwen/Qwen3-VL-8B-Instruct --output runs/kontext
    python examples/evaluate.py compare runs/kontext runs/kontext-lora

The same command goes on where it was stopped: images that are there are not made again, answers
that came are not asked for again. ``accelerate launch`` spreads the chains over ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from accelerate import PartialState
from mteditflow_examples.evaluating.editors import Model, call_options
from mteditflow_examples.evaluating.images import ByRow, MadeImages
from mteditflow_examples.evaluating.output import (
    Finished,
    keep_settings,
    show,
    write_all,
    write_scores,
)
from mteditflow_examples.evaluating.scoring import score_chains
from mteditflow_examples.flux.config import Rewards
from tqdm import tqdm

from mteditflow._text import escape_controls
from mteditflow.chains import Chain, read_chains
from mteditflow.evaluation import most_changed, report_difference, report_of
from mteditflow.evaluation.gallery import Series
from mteditflow.evaluation.tables import checks_in_short
from mteditflow.rewards import Detector
from mteditflow.rewards.command_line import (
    AnswerTokens,
    ChatTemplateKwargs,
    ExtraBody,
    ReasoningTokens,
)

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)


SUCCESS = {"binary": 1.0, "likert": 5.0}  # score of a followed turn, by scale
Gallery = Annotated[int, typer.Option(min=0, help="Most chains on the gallery page.")]


@app.command()
def run(
    chains: Annotated[Path, typer.Argument(help="File of chains, in any supported format.")],
    editor: Annotated[str | None, typer.Option(help="Edit pipeline, path or hub id.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of images already made.")] = None,
    output: Annotated[Path, typer.Option(help="Folder of all that is made.")] = Path("runs/edits"),
    title: Annotated[str | None, typer.Option(help="Name in reports; else the editor's.")] = None,
    turns: Annotated[
        int | None, typer.Option(min=1, help="At most; longer chains are cut.")
    ] = None,
    references: Annotated[Path | None, typer.Option(help="Folder of the references.")] = None,
    lora: Annotated[str | None, typer.Option(help="LoRA in diffusers format.")] = None,
    call: Annotated[list[str] | None, typer.Option(help="key=value of each call.")] = None,
    resolution: Annotated[int | None, typer.Option(min=1, help="Square to fit into.")] = None,
    dtype: Annotated[
        Literal["bfloat16", "float32"], typer.Option(help="Of the editor's weights.")
    ] = "bfloat16",
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Chains edited at once, per rank.")] = 8,
    judge: Annotated[list[str] | None, typer.Option(help="URL ending in /v1.")] = None,
    model: Annotated[str, typer.Option(help="Name that the judge is known by.")] = "",
    scale: Annotated[
        Literal["binary", "likert"], typer.Option(help="What the judge answers.")
    ] = "binary",
    thinking: Annotated[bool, typer.Option(help="Let the judge analyse first.")] = True,
    answer_tokens: AnswerTokens = None,
    reasoning_tokens: ReasoningTokens = 0,
    chat_template_kwargs: ChatTemplateKwargs = None,
    extra_body: ExtraBody = None,
    checks: Annotated[
        Literal["question", "edival"], typer.Option(help="edival: by edit type.")
    ] = "question",
    detector: Annotated[str | None, typer.Option(help="Grounding DINO, path or hub id.")] = None,
    consistency: Annotated[list[str] | None, typer.Option(help="URL ending in /v1.")] = None,
    terms: Annotated[
        Literal["features", "l1"], typer.Option(help="What consistency compares.")
    ] = "features",
    scorer: Annotated[str | None, typer.Option(help="module:name in place of both.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 64,
    preference: Annotated[str | None, typer.Option(help="PickScore, path or hub id.")] = None,
    max_invalid: Annotated[
        float, typer.Option(min=0, max=1, help="Share of chains not counted that is an error.")
    ] = 0.2,
    shown: Gallery = 200,
) -> None:
    """Make images of chains, or take those of a folder, score them, and write a report."""
    if (editor is None) == (images is None):
        raise typer.BadParameter("expected either --editor or --images")
    if scorer is None and not (judge and model):
        raise typer.BadParameter("expected --judge and --model, or --scorer")
    by_type = checks == "edival"
    if by_type and (scorer is not None or scale != "binary"):
        raise typer.BadParameter("--checks edival: expected no --scorer and --scale binary")
    if detector is not None and not by_type:
        raise typer.BadParameter("--detector: expected --checks edival with it")
    rewards = Rewards(
        judge=tuple(judge or ()),
        judge_model=model,
        scope="turn",
        scale=scale,
        thinking=thinking,
        answer_tokens=answer_tokens,
        reasoning_tokens=reasoning_tokens,
        chat_template_kwargs=chat_template_kwargs or {},
        extra_body=extra_body or {},
        consistency=tuple(consistency or ()),
        terms=terms,
        concurrency=concurrency,
        scorer=scorer,
        success=SUCCESS[scale],
    )
    with _ending():  # before anything is loaded
        _ = rewards.request
    state = PartialState()
    with _ending():
        finder = _detector(detector, state.device) if detector and state.is_main_process else None
        reading = read_chains(chains, strict=False, images=references, check_images=True)
        if not reading.chains:
            why = "; ".join(x.reason for x in reading.skipped[:3])
            raise ValueError(f"{chains}: expected at least one usable chain, got none: {why}")
        asked = [x.first_turns(min(turns or x.turns, x.turns)) for x in reading.chains]
        made = MadeImages(output / "images" if images is None else images.resolve(), resolution)
        settings = {
            "images": "images" if images is None else str(made.folder),
            "chains": hashlib.sha256(chains.read_bytes()).hexdigest(),
            "resolution": resolution,
        }
        if editor is not None:
            edits = Model(editor, lora, dtype, call_options(call or []), resolution, seed)
            settings |= asdict(edits)
        with state.main_process_first():
            keep_settings(output, settings)
        if editor is not None:
            made.make(edits, asked, state, batch)
        if not state.is_main_process:
            return
        with tqdm(total=len(asked), desc="scoring", unit="chain", disable=None) as bar:
            evaluation, ways, missing = score_chains(
                rewards,
                asked,
                made,
                cache=output / "answers.sqlite",
                by_type=by_type,
                detector=finder,
                preference=(preference, str(state.device)) if preference else None,
                done=bar.update,
            )
        sources = [str(source) for source in (editor or images, lora) if source]
        name = title or " + ".join("/".join(Path(source).parts[-2:]) for source in sources)
        left_out = {f"{x.file.name}:{x.line}": x.reason for x in reading.skipped} | missing
        scored = [chain for chain in asked if chain.id not in missing]
        report = report_of(evaluation, scored, title=name, left_out=left_out, ways=ways)
        write_scores(output, evaluation, scored)
        series = [Series(name, evaluation, ByRow(made, scored))]
        write_all(output, report, [report], series, scored, range(min(shown, len(scored))))
    show(report, output)
    if 1 - report.counted / report.asked > max_invalid:
        typer.echo(f"error: only {report.counted} of {report.asked} chains counted", err=True)
        raise typer.Exit(1)


def _detector(path: str, device: torch.device) -> Detector:
    """Load a detector; transformers takes its time to import."""
    from mteditflow.rewards import GroundingDino

    return GroundingDino.from_pretrained(path, device=device)


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="Output folder of a run.")],
    after: Annotated[Path, typer.Argument(help="Of another, on the same chains.")],
    output: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("runs/compared"),
    shown: Gallery = 50,
) -> None:
    """Compare two runs chain by chain: differences with intervals, and who changed most."""
    with _ending():
        runs = [Finished(folder) for folder in (before, after)]
        chains, left_out = _common(*runs)
        series = [run.series(chains) for run in runs]
        old, new = (one.evaluation for one in series)
        title = f"{series[1].name} minus {series[0].name}"
        report = report_difference(old, new, chains, title=title, left_out=left_out)
        told = tuple(checks_in_short(run.report) for run in runs)
        report = report.model_copy(update={"notes": report.notes + told})
        rows = [change.row for change in most_changed(old, new)[:shown]]
        write_all(output, report, [run.report for run in runs], series, chains, rows)
    show(report, output)


def _common(before: Finished, after: Finished) -> tuple[list[Chain], dict[str, str]]:
    """Chains of both runs, and the ids of the others with the reason.

    Raises:
        ValueError: there is none.
    """
    here, there = ({chain.id for chain in run.chains} for run in (before, after))
    chains = [chain for chain in before.chains if chain.id in there]
    if not chains:
        raise ValueError("expected chains that both runs scored, got none")
    left_out = dict.fromkeys(sorted(here - there), "only the first run scored it")
    return chains, left_out | dict.fromkeys(sorted(there - here), "only the second run scored it")


@contextmanager
def _ending() -> Iterator[None]:
    """End with a message, not a traceback, where a file or an option is not usable."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise typer.BadParameter(escape_controls(str(error))) from error


if __name__ == "__main__":
    app()
