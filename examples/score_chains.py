"""Score a folder of edited chains by a judge of instruction following and a consistency server.

    python examples/score_chains.py chains.jsonl edited \
        --judge http://127.0.0.1:8000/v1 --model Qwen/Qwen3-VL-8B-Instruct \
        --consistency http://127.0.0.1:8200/v1

Chains may be in any format that `python -m mteditflow.chains formats` lists. Lost scores are
counted, and left out of the averages; the same command requests only those again. ``edited`` has
``<id>/turn_<t>.png``, as written by ``evaluate.py``, or EdiVal-Bench's official
``<id>_input_raw_turn_<t>.png``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import typer
from mteditflow_examples.evaluating.images import no_images
from mteditflow_examples.evaluating.measures import TERMS, Scale, Terms, measures, summarize
from mteditflow_examples.evaluating.options import refusing_options
from mteditflow_examples.flux.config import Rewards
from mteditflow_examples.flux.scoring import (
    check_services,
    consistency_client,
    judge_client,
    judged_by,
    prompt_of,
    require_services,
)
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from mteditflow._command import OneLineCommand, writing
from mteditflow._exits import failing
from mteditflow._files import require_folder, write_atomically
from mteditflow._images import BOMBS, UNREADABLE, read_image
from mteditflow._text import escape_controls, escape_markup
from mteditflow.chains import (
    Chain,
    ChainDataset,
    ChainError,
    EditedImages,
    Skipped,
    read_chains,
)
from mteditflow.chains.files import is_outside
from mteditflow.evaluation import JudgedBy
from mteditflow.evaluation.provenance import agreed, same_judge
from mteditflow.metrics import FEW_CASES
from mteditflow.rewards import (
    AnswerCache,
    Background,
    ConsistencyClient,
    ConsistencyScores,
    InvalidRewardsError,
    Judge,
    TurnScores,
    pairs_of,
)
from mteditflow.rewards.command_line import (
    AnswerTokens,
    ChatTemplateKwargs,
    ExtraBody,
    ReasoningTokens,
    require_or_answers,
)

SCORES = "scores.json"
BATCH = 64  # chains per batch; one batch is loaded while another is scored

app = typer.Typer(pretty_exceptions_enable=False)


def load(dataset: ChainDataset, index: int, folder: Path, name: str | None) -> list[Image.Image]:
    """Load a chain's reference and the result of each turn.

    Raises:
        ChainError: an image is missing or broken, or the id is a path out of the folder.
    """
    chain, reference, _ = dataset[index]
    _ = chain.reference  # raises for a chain without reference: there is nothing to compare with
    if name is None:
        return [reference, *EditedImages(folder).load(chain)]
    if "{id" in name and is_outside(folder / chain.id, folder):
        raise ChainError(f"id: expected a name within {folder}, got {chain.id!r}")
    images = [reference]
    for turn in range(1, chain.turns + 1):
        file = folder / name.format(id=chain.id, image=Path(chain.reference).stem, turn=turn)
        try:
            images.append(read_image(file))
        except (*UNREADABLE, *BOMBS) as error:
            raise ChainError(f"turn {turn}: expected an image, got {file}: {error}") from error
    return images


class Answers(NamedTuple):
    """Results of all chains."""

    shown: list[Chain]  # scored chains
    left_out: dict[str, str]  # reason by id of a chain whose images cannot be read
    following: TurnScores | None
    kept: ConsistencyScores | None


class Batch(NamedTuple):
    """Chains with their images."""

    chains: list[Chain]
    images: list[list[Image.Image]]


def batches(
    dataset: ChainDataset, folder: Path, name: str | None, left_out: dict[str, str]
) -> Iterator[Batch]:
    """Yield batches; add chains whose images cannot be read to ``left_out`` with the reason."""
    for start in range(0, len(dataset), BATCH):
        batch = Batch([], [])
        for index in range(start, min(start + BATCH, len(dataset))):
            chain = dataset.chains[index]
            try:
                batch.images.append(load(dataset, index, folder, name))
                batch.chains.append(chain)
            except ChainError as error:
                left_out[chain.id] = str(error)
        if batch.chains:
            yield batch


def require_images(dataset: ChainDataset, folder: Path, name: str | None) -> None:
    """Raise unless at least one chain has all of its images, before anything is written.

    Raises:
        ValueError: no chain has; the message has the reasons.
    """
    left_out: dict[str, str] = {}
    if next(batches(dataset, folder, name, left_out), None) is None:
        raise no_images(left_out)


def score(
    dataset: ChainDataset, folder: Path, name: str | None, rewards: Rewards, cache: Path
) -> Answers:
    """Score all batches; the images of one are loaded while the previous one is scored."""
    shown, left_out, results = [], {}, []
    asked: list[Any] = []  # futures of the previous batch, from judge and consistency server
    with (
        AnswerCache(cache) as answers,
        Background() as background,
        tqdm(total=len(dataset), unit="chain") as bar,
    ):
        services = _services(rewards, answers)
        for batch in batches(dataset, folder, name, left_out):
            # `asked` is the previous batch: await it only after this one has been loaded.
            results.append([future and future.result() for future in asked])
            bar.update(len(shown) - bar.n)
            asked = [s and background.submit(s.score, *batch) for s in services]
            shown += batch.chains
        results.append([future and future.result() for future in asked])
        bar.update(len(dataset) - bar.n)
    scored = [pair for pair in results if pair]
    following, kept = ([pair[i] for pair in scored if pair[i] is not None] for i in range(2))
    return Answers(
        shown,
        left_out,
        TurnScores.concatenate(following) if following else None,
        ConsistencyScores.concatenate(kept) if kept else None,
    )


def _services(
    rewards: Rewards, cache: AnswerCache
) -> tuple[Judge | None, ConsistencyClient | None]:
    """Return the clients of the configured services; None for a missing one."""
    judge = Judge(judge_client(rewards, cache=cache), prompt_of(rewards)) if rewards.judge else None
    return judge, consistency_client(rewards, cache=cache) if rewards.consistency else None


def details(
    shown: Sequence[Chain], following: TurnScores | None, consistency: ConsistencyScores | None
) -> list[dict[str, Any]]:
    """Return all scores per chain, as JSON values: null if missing, with reasons if lost."""
    columns: dict[str, Tensor] = {}
    lost: dict[tuple[int, int], list[str]] = {}
    if following is not None:
        columns["following"] = following.score
    if consistency is not None:
        columns |= {term: getattr(consistency, term) for term in sum(TERMS.values(), ())}
    for scores in (following, consistency):
        for where, reason in ({} if scores is None else scores.lost).items():
            lost.setdefault(where, []).append(str(reason))
    return [
        {"id": chain.id, "instructions": chain.instructions}
        | {
            name: [None if math.isnan(x) else x for x in column[b, : chain.turns].tolist()]
            for name, column in columns.items()
        }
        | {"lost": {n + 1: lost[b, n] for n in range(chain.turns) if (b, n) in lost}}
        for b, chain in enumerate(shown)
    ]


def show(table_of: dict[str, dict[str, Any]], console: Console) -> None:
    """Print a table of all measures by turn."""
    few = f"* fewer than {FEW_CASES}"
    table = Table(title=f"per turn \\[95% interval over chains] (chains scored; {few})")
    table.add_column("")
    for turn in range(len(next(iter(table_of.values()))["estimate"])):
        table.add_column(f"turn {turn + 1}", justify="right")
    for name, row in table_of.items():
        cells = zip(row["estimate"], row["interval"], row["chains"], strict=True)
        table.add_row(
            name,
            *(
                f"none ({count})"
                if value is None
                else f"{value} [{low}, {high}] ({count}{' *' * (count < FEW_CASES)})"
                for value, (low, high), count in cells
            ),
        )
    console.print(table)


def finish(
    found: Answers,
    skipped_lines: Sequence[Skipped],
    judged: JudgedBy,
    rewards: Rewards,
    path: Path,
    max_invalid: float,
) -> None:
    """Write the report, then print it.

    Raises:
        typer.Exit: code 1 if more than ``max_invalid`` of the chains lost a score.
    """
    console = Console(width=None if Console().is_terminal else 120, highlight=False)
    terms: Terms = "features" if rewards.terms == "features" else "pixels"
    scale: Scale = "likert" if rewards.scale == "likert" else "binary"
    shown, skipped, following, kept = found
    left_out = [*map(str, skipped_lines), *(f"{i}: {why}" for i, why in skipped.items())]
    table = {each.name: summarize(each) for each in measures(following, kept, scale, terms)}
    own = kept and (kept.scores if terms == "features" else kept.l1_scores)
    scored = {"following": following, "consistency": own}
    report = {
        "summary": table,
        "invalid": {
            what: {"share": scores.invalid_share, "turns_by_reason": scores.reasons}
            | {"unmeasured_turns": int(scores.unmeasured.sum())}
            for what, scores in scored.items()
            if scores is not None
        },
        "left_out": left_out,
        "judged_by": judged.model_dump(),
        "chains": details(shown, following, kept),
    }
    write_atomically(path, (json.dumps(report, indent=1, allow_nan=False) + "\n").encode())
    for reason in left_out:
        console.print(f"left out: {escape_controls(reason)}", markup=False)
    console.print(f"{len(shown)} chains, {len(left_out)} left out")
    show(table, console)
    console.print(f"Judged by: {escape_controls(str(judged))}.", markup=False)
    console.print(f"Every score is in [bold]{escape_markup(str(path))}[/bold].")
    for what, scores in scored.items():
        if scores is not None and scores.reasons:
            reasons = ", ".join(f"{count} {reason}" for reason, count in scores.reasons.items())
            console.print(f"{what}: {scores.invalid_share:.1%} of chains invalid; turns: {reasons}")
        if scores is not None and bool(scores.unmeasured.any()):
            nothing = int(scores.unmeasured.sum())
            console.print(f"{what}: nothing to measure in {nothing} turns (not lost)")
    try:
        for scores in scored.values():
            if scores is not None:
                scores.require(max_invalid_share=max_invalid)
    except InvalidRewardsError as error:
        console.print(f"[red]error:[/red] {escape_markup(str(error))}")
        raise typer.Exit(1) from error


def _check_name(name: str) -> None:
    """Raise ValueError unless ``name`` is a valid pattern of file names."""
    try:
        name.format(id="", image="", turn=1)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise ValueError(
            f"--name: expected a pattern of {{id}}, {{image}} and {{turn}}, got {name!r} ({error})"
        ) from error


def main(
    chains: Annotated[Path, typer.Argument(help="File of chains, in any supported format.")],
    edited: Annotated[Path, typer.Argument(help="Folder of an editor's images.")],
    judge: Annotated[
        list[str] | None, typer.Option(help="URL of a judge, ending in /v1; may be repeated.")
    ] = None,
    model: Annotated[str, typer.Option(help="Model name sent to the judge.")] = "",
    consistency: Annotated[
        list[str] | None, typer.Option(help="URL of a mteditflow.rewards.server.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of scores.json and the cache.")] = Path(
        "runs/scores"
    ),
    name: Annotated[
        str | None,
        typer.Option(
            help="Pattern of file names by another program, of {id}, {image} (the reference's "
            "stem) and {turn}. Default: {id}/turn_{turn}.png."
        ),
    ] = None,
    scope: Annotated[
        Literal["turn", "trajectory"], typer.Option(help="Turns that one judge call scores.")
    ] = "turn",
    scale: Annotated[Scale, typer.Option(help="Scale of the judge's scores.")] = "binary",
    thinking: Annotated[bool, typer.Option(help="Ask for an analysis before each score.")] = True,
    answer_format: Annotated[
        Literal["json", "text"], typer.Option(help="text: for a server without structured output.")
    ] = "json",
    answer_tokens: AnswerTokens = None,
    reasoning_tokens: ReasoningTokens = 0,
    chat_template_kwargs: ChatTemplateKwargs = None,
    extra_body: ExtraBody = None,
    pairing: Annotated[
        Literal["reference", "consecutive"],
        typer.Option(help="Image that a turn's image is compared with."),
    ] = "reference",
    terms: Annotated[Terms, typer.Option(help="Consistency measure.")] = "features",
    allow_outside: Annotated[
        bool, typer.Option("--allow-outside", help="Allow images outside the file's folder.")
    ] = False,
    max_invalid: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of lost chains above which the exit code is 1."),
    ] = 0.2,
) -> None:
    """Score, print a table, write scores.json.

    The judge's API key is read from OPENAI_API_KEY, the server's token from MTEDITFLOW_TOKEN.
    """
    with refusing_options(), ExitStack() as stack:
        if not judge and not consistency:
            raise ValueError("expected --judge, --consistency or both")
        if judge and not model:
            raise ValueError("expected --model, the name that the judge is known by")
        rewards = Rewards(
            judge=tuple(judge or ()),
            judge_model=model,
            scope=scope,
            scale=scale,
            thinking=thinking,
            answer_format=answer_format,
            answer_tokens=answer_tokens,
            reasoning_tokens=reasoning_tokens,
            chat_template_kwargs=chat_template_kwargs or {},
            extra_body=extra_body or {},
            consistency=tuple(consistency or ()),
            terms="features" if terms == "features" else "l1",
            pairing=pairing,
        )
        check_services(rewards)
        require_folder("--output", output)
        if not edited.is_dir():
            raise ValueError(f"edited: expected a folder of images, got none: {edited}")
        if name is not None:
            _check_name(name)
        reading = read_chains(chains, strict=False, allow_outside=allow_outside)
        for chain in reading.chains if consistency else ():
            pairs_of(chain, pairing=pairing)
        dataset, cache = ChainDataset(reading.chains), output / "answers.sqlite"
        require_images(dataset, edited, name)
        judged = same_judge(output / SCORES, judged_by(rewards))
        most = 2 if scope == "turn" else 1 + max(chain.turns for chain in dataset.chains)
        require_or_answers(partial(require_services, rewards, images=most), cache)
        stack.enter_context(writing(output))
        stack.enter_context(failing(ValueError))
        found = score(dataset, edited, name, rewards, cache)
        judged = agreed(judged, judged_by(rewards))  # with what servers could not say before
        finish(found, reading.skipped, judged, rewards, output / SCORES, max_invalid)


app.command(cls=OneLineCommand)(main)


if __name__ == "__main__":
    app()
