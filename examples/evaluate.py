r"""Evaluate any editor on chains of edits: make images, score every turn, report with intervals.

    python examples/evaluate.py run chains.jsonl --editor black-forest-labs/FLUX.1-Kontext-dev \
        --judge http://127.0.0.1:8000/v1 --model Qwen/Qwen3-VL-8B-Instruct --output runs/kontext
    python examples/evaluate.py compare runs/kontext runs/kontext-lora
    python examples/evaluate.py lme lme_bench.json edited --judge ... --model ...

The same command resumes an interrupted run: existing images are not made again, and stored answers
are not requested again. ``accelerate launch`` distributes the chains over ranks.

``--scorer module:name`` is a custom scorer class; its module may be in the current folder. See
docs/evaluation.md, "A scorer of your own", for an example of ten lines.
"""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from mteditflow_examples.evaluating.editors import Model, call_options, rows_of
from mteditflow_examples.evaluating.images import ByRow, MadeImages
from mteditflow_examples.evaluating.options import (
    EDITOR,
    JUDGE,
    few_lines,
    refuse_ignored,
    refusing_options,
)
from mteditflow_examples.evaluating.output import (
    CHAINS,
    EVALUATION,
    Finished,
    Settings,
    naming_folders,
    report_files,
    score_files,
    show,
)
from mteditflow_examples.evaluating.scoring import Asks, score_chains
from mteditflow_examples.evaluating.sessions import lme, mice, mse
from mteditflow_examples.flux.config import Rewards
from mteditflow_examples.flux.scoring import require_services
from tqdm import tqdm

from mteditflow._command import OneLineGroup, writing
from mteditflow._exits import failing, naming_argument
from mteditflow._files import require_folder, write_all_atomically
from mteditflow.chains import Chain, ChainError, Reading, read_chains, recognize
from mteditflow.evaluation import MadeBy, most_changed, report_difference, report_of
from mteditflow.evaluation.gallery import Series
from mteditflow.evaluation.provenance import require_same_judge
from mteditflow.evaluation.tables import checks_in_short
from mteditflow.rewards import pairs_of
from mteditflow.rewards.command_line import (
    AnswerTokens,
    ChatTemplateKwargs,
    ExtraBody,
    ReasoningTokens,
    require_or_answers,
)

app = typer.Typer(
    cls=OneLineGroup, help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False
)
for benchmark in (lme, mse, mice):
    app.command()(benchmark)

Gallery = Annotated[int, typer.Option(min=0, help="Most chains on the gallery page.")]


@app.command()
def run(
    context: typer.Context,
    chains: Annotated[Path, typer.Argument(help="File of chains, in any supported format.")],
    editor: Annotated[str | None, typer.Option(help="Editing pipeline, path or Hub id.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of existing images.")] = None,
    output: Annotated[Path, typer.Option(help="Folder of all output.")] = Path("runs/edits"),
    title: Annotated[
        str | None, typer.Option(help="Name in reports. Default: the editor's.")
    ] = None,
    turns: Annotated[
        int | None, typer.Option(min=1, help="Most turns; longer chains are cut.")
    ] = None,
    references: Annotated[Path | None, typer.Option(help="Folder of the references.")] = None,
    allow_outside: Annotated[
        bool, typer.Option("--allow-outside", help="Allow references outside their folder.")
    ] = False,
    lora: Annotated[str | None, typer.Option(help="LoRA in diffusers format.")] = None,
    call: Annotated[
        list[str] | None, typer.Option(help="key=value, argument of each pipeline call.")
    ] = None,
    resolution: Annotated[
        int | None,
        typer.Option(min=1, help="Side of the square for references, pixels. Default: own shape."),
    ] = None,
    dtype: Annotated[
        Literal["bfloat16", "float32"], typer.Option(help="Dtype of the editor's weights.")
    ] = "bfloat16",
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    noise: Annotated[
        Literal["id", "row"],
        typer.Option(
            help="Key of a chain's noise beside the seed: its id, or its row, as in the held-out "
            "evaluations of training."
        ),
    ] = "id",
    history: Annotated[
        Literal["last", "original"],
        typer.Option(help="Input images of later turns, unless chains have references."),
    ] = "last",
    batch: Annotated[int, typer.Option(min=1, help="Chains edited at once, per rank.")] = 8,
    judge: Annotated[list[str] | None, typer.Option(help="Judge's URL, ending in /v1.")] = None,
    model: Annotated[str, typer.Option(help="Model name sent to the judge.")] = "",
    scale: Annotated[
        Literal["binary", "likert"] | None,
        typer.Option(help="0 or 1, or 1 to 5. Default: binary; for a scorer its own scale."),
    ] = None,
    success: Annotated[
        float | None,
        typer.Option(help="Score from which a turn counts as followed. Default: the scale's."),
    ] = None,
    thinking: Annotated[bool, typer.Option(help="Ask the judge for an analysis first.")] = True,
    answer_tokens: AnswerTokens = None,
    reasoning_tokens: ReasoningTokens = 0,
    chat_template_kwargs: ChatTemplateKwargs = None,
    extra_body: ExtraBody = None,
    checks: Annotated[
        Literal["question", "edival"],
        typer.Option(help="Check of success: a judge's question, or edival, by edit type."),
    ] = "question",
    detector: Annotated[
        str | None, typer.Option(help="Grounding DINO for edival, path or Hub id.")
    ] = None,
    ocr: Annotated[
        bool, typer.Option(help="Read text edits by rapidocr instead of the judge.")
    ] = False,
    consistency: Annotated[
        list[str] | None, typer.Option(help="Consistency server's URL, ending in /v1.")
    ] = None,
    terms: Annotated[
        Literal["features", "l1"], typer.Option(help="Consistency measure.")
    ] = "features",
    scorer: Annotated[
        str | None,
        typer.Option(help="Custom scorer module:name, in place of both services."),
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 64,
    preference: Annotated[str | None, typer.Option(help="PickScore, path or Hub id.")] = None,
    destroyed_below: Annotated[
        float | None,
        typer.Option(
            help="Consistency with the original below which a turn counts as destroyed, for the "
            "collapse rate CR. Default: no CR unless the scorer flags destroyed turns."
        ),
    ] = None,
    max_invalid: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of lost chains above which the exit code is 1."),
    ] = 0.2,
    shown: Gallery = 200,
) -> None:
    """Make images of chains, or read them from a folder, score them, and write a report."""
    from accelerate import PartialState

    with refusing_options(), ExitStack() as stack:
        asks = Asks(checks == "edival", detector, ocr, preference, destroyed_below)
        if (editor is None) == (images is None):
            raise ValueError("expected either --editor or --images")
        if images is not None:
            refuse_ignored(context, "--images", EDITOR)
            if not images.is_dir():
                raise ValueError(f"--images: expected a folder of images, got none: {images}")
        require_folder("--output", output)
        rewards = _rewards(
            judge=tuple(judge or ()),
            judge_model=model,
            scope="turn",
            scale=scale or (None if scorer else "binary"),
            thinking=thinking,
            answer_tokens=answer_tokens,
            reasoning_tokens=reasoning_tokens,
            chat_template_kwargs=chat_template_kwargs or {},
            extra_body=extra_body or {},
            consistency=tuple(consistency or ()),
            terms=terms,
            concurrency=concurrency,
            scorer=scorer,
            success=success,
        )
        if scorer is not None:
            refuse_ignored(context, "--scorer", JUDGE)
        asks.check(rewards)
        state = PartialState()
        reading, asked = _usable(chains, references, turns, rewards, allow_outside)
        made = MadeImages(output / "images" if images is None else images.resolve(), resolution)
        options = call_options(call or [])
        rows = rows_of(asked, turns) if noise == "row" else None
        edits = editor and Model(editor, lora, dtype, options, resolution, seed, history, rows)
        maker = MadeBy(images=str(made.folder), resolution=resolution)

        def settings() -> Settings:
            """Return the settings, with identities known by now from servers, Hub and folder."""
            return Settings(
                images="images" if images is None else str(made.folder),
                chains=hashlib.sha256(chains.read_bytes()).hexdigest(),
                resolution=resolution,
                provenance=asks.provenance(rewards, edits.made_by if edits else maker),
            ).agreed(output)

        cache = output / "answers.sqlite"
        if state.is_main_process:
            require_or_answers(partial(require_services, rewards, images=2), cache)
        # Settings are computed twice: a server may not return its identity until it has worked.
        first = settings()
        missing = made.missing(asked, state) if edits else []
        if edits and missing:
            edits.check(missing)
        if not edits:
            made.require_any(asked)
        if state.is_main_process:
            stack.enter_context(writing(output))
        stack.enter_context(failing(ValueError))
        if edits:
            loaded = edits.load(state.device) if missing else None
            with state.main_process_first():
                first.write(output)
            made.make(loaded, missing, state, batch, history)
        if not state.is_main_process:
            return
        with tqdm(total=len(asked), desc="scoring", unit="chain", disable=None) as bar:
            evaluation, ways, left_out = score_chains(
                rewards,
                asked,
                made,
                asks,
                cache=cache,
                device=state.device,
                done=bar.update,
            )
        last = settings()
        evaluation = replace(evaluation, provenance=last.provenance)
        sources = [str(source) for source in (editor or images, lora) if source]
        name = title or " + ".join("/".join(Path(source).parts[-2:]) for source in sources)
        scored = [chain for chain in asked if chain.id not in left_out]
        left_out = {f"{x.file.name}:{x.line}": x.reason for x in reading.skipped} | left_out
        report = report_of(evaluation, scored, title=name, left_out=left_out, ways=ways)
        series = [Series(name, evaluation, ByRow(made, scored))]
        files = report_files(report, [report], series, scored, range(min(shown, len(scored))))
        write_all_atomically(output, files | score_files(output, last, evaluation, scored))
    show(report, output)
    if report.invalid_share > max_invalid:
        lost = len(report.left_out) + len(report.lost)
        typer.echo(
            f"error: {lost} of {report.asked} chains were left out or lost a score, more than "
            f"the {max_invalid:.0%} allowed",
            err=True,
        )
        raise typer.Exit(1)


def _rewards(**options: Any) -> Rewards:
    """Return the configuration of scoring.

    Raises:
        ValueError: neither a judge nor a scorer is given, or a scorer in addition to services.
    """
    rewards = Rewards(**options)
    if rewards.scorer is None and not (rewards.judge and rewards.judge_model):
        raise ValueError("expected --judge and --model, or --scorer")
    if rewards.scorer is not None and (rewards.judge or rewards.consistency):
        raise ValueError("--scorer: expected no --judge and no --consistency beside it")
    return rewards


def _usable(
    file: Path, references: Path | None, turns: int | None, rewards: Rewards, allow_outside: bool
) -> tuple[Reading, list[Chain]]:
    """Read a file of chains, and cut the usable ones to their first turns.

    Raises:
        ValueError: no chain is usable, or one lacks the objects that consistency needs.
        OSError: reading fails for a reason other than the file's content.
    """
    with naming_argument("CHAINS", ChainError):
        reading = read_chains(
            file, strict=False, images=references, check_images=True, allow_outside=allow_outside
        )
    if not reading.chains:
        raise ValueError(
            f"CHAINS: {file}: expected at least one usable chain, got none, read as the format "
            f"{recognize(file).name}: {few_lines(reading.skipped)}; `mteditflow chains formats` "
            "lists the formats"
        )
    chains = [x.first_turns(min(turns or x.turns, x.turns)) for x in reading.chains]
    for chain in chains if rewards.consistency else ():
        pairs_of(chain, pairing=rewards.pairing)
    return reading, chains


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="Output folder of a run.")],
    after: Annotated[Path, typer.Argument(help="Output folder of another, on the same chains.")],
    output: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("runs/compared"),
    across_judges: Annotated[
        bool,
        typer.Option("--across-judges", help="Compare even scores of different judges."),
    ] = False,
    shown: Gallery = 50,
) -> None:
    """Compare two runs chain by chain: differences with intervals, and the largest changes."""
    with refusing_options():
        require_folder("--output", output)
        if (output / EVALUATION).exists():
            raise ValueError(f"--output: expected a folder without an evaluation, got {output}")
        runs = [_finished("BEFORE", before), _finished("AFTER", after)]
        chains, left_out = _common(*runs)
        if runs[0].report.title == runs[1].report.title:  # such as two scorers of the same images
            for run in runs:
                name = f"{run.report.title} ({run.folder})"
                run.report = run.report.model_copy(update={"title": name})
        series = [run.series(chains) for run in runs]
        old, new = (one.evaluation for one in series)
        title = f"{series[1].name} minus {series[0].name}"
        if not across_judges:
            judges = (one.provenance.judged_by for one in (old, new))
            require_same_judge(*judges, known=True)
        with naming_folders(before, after):
            report = report_difference(
                old, new, chains, title=title, left_out=left_out, across_judges=across_judges
            )
        told = tuple(checks_in_short(run.report) for run in runs)
        report = report.model_copy(update={"notes": report.notes + told})
        changes = most_changed(old, new, across_judges=across_judges)
        rows = [change.row for change in changes[:shown]]
        drawn = [run.report for run in runs]
        write_all_atomically(output, report_files(report, drawn, series, chains, rows))
    show(report, output)


def _finished(argument: str, folder: Path) -> Finished:
    """Read an evaluation from its folder; errors start with the argument's name."""
    with naming_argument(argument, ValueError):
        return Finished(folder)


def _common(before: Finished, after: Finished) -> tuple[list[Chain], dict[str, str]]:
    """Return the chains of both runs, and the ids of all others with the reason.

    Raises:
        ValueError: no chain is common, or common chains differ in turns or edit types.
    """
    here, there = ({chain.id for chain in run.chains} for run in (before, after))
    chains = [chain for chain in before.chains if chain.id in there]
    if not chains:
        raise ValueError(
            f"expected chains that both runs scored, got none in {before.folder} and {after.folder}"
        )
    turns = {chain.id: chain.turns for chain in after.chains}
    if other := [chain for chain in chains if turns[chain.id] != chain.turns]:
        raise ValueError(
            f"{after.folder}: expected as many turns as in {before.folder}, got "
            f"{turns[other[0].id]} and {other[0].turns} for chain {other[0].id!r}"
        )
    types = {chain.id: chain.task_types for chain in after.chains}
    if other := [chain.id for chain in chains if types[chain.id] != chain.task_types]:
        raise ValueError(
            f"{after.folder / CHAINS}: expected the edit types of {before.folder / CHAINS}, got "
            f"others for chain {other[0]!r}"
        )
    left_out = dict.fromkeys(sorted(here - there), "only the first run scored it")
    return chains, left_out | dict.fromkeys(sorted(there - here), "only the second run scored it")


if __name__ == "__main__":
    app()
