"""Score a folder of edited chains: a judge for instruction following, a server for consistency.

    python examples/score_chains.py chains.jsonl edited \
        --judge http://127.0.0.1:8000/v1 --model Qwen/Qwen3-VL-8B-Instruct \
        --consistency http://127.0.0.1:8200/v1

Chains may be in any format that `python -m mteditflow.chains formats` lists. What is lost on the
way stays out of the averages, is counted, and is asked for again, alone, by the same command.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import typer
from PIL import Image, ImageOps
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from mteditflow import (
    bootstrap_interval,
    content_consistency,
    instruction_following,
    marginal_success,
    overall,
)
from mteditflow._text import escape_controls, escape_markup
from mteditflow.chains import Chain, ChainDataset, ChainError, read_chains
from mteditflow.rewards import (
    AnswerCache,
    Background,
    ChatClient,
    ConsistencyClient,
    ConsistencyScores,
    InvalidRewardsError,
    Judge,
    JudgePrompt,
    TurnScores,
)
from mteditflow.rewards.command_line import (
    AnswerTokens,
    ChatTemplateKwargs,
    ExtraBody,
    ReasoningTokens,
    request_options,
)

BATCH = 64  # chains whose images are in memory at a time, twice: being loaded, being scored


Scale = Literal["binary", "likert"]
Terms = Literal["features", "pixels"]
TERMS: dict[Terms, tuple[str, str]] = {
    "features": ("object", "background"),
    "pixels": ("object_l1", "background_l1"),
}


def load(dataset: ChainDataset, index: int, folder: Path, name: str) -> list[Image.Image]:
    """Load a chain's reference and what each turn made of it."""
    chain, reference, _ = dataset[index]
    images = [reference]
    for turn in range(1, chain.turns + 1):
        file = name.format(id=chain.id, image=Path(chain.image).stem, turn=turn)
        with Image.open(folder / file) as image:
            images.append(ImageOps.exif_transpose(image).convert("RGB"))
    return images


class Answers(NamedTuple):
    """What came of all chains."""

    shown: list[Chain]  # those that were scored
    left_out: dict[str, str]  # id of a chain whose images cannot be read, and why
    following: TurnScores | None
    kept: ConsistencyScores | None


def score(
    dataset: ChainDataset,
    folder: Path,
    name: str,
    asks: Judge | None,
    looks: ConsistencyClient | None,
) -> Answers:
    """Score batch after batch; the images of one are loaded while the one before is scored."""
    shown, left_out, results = [], {}, []
    asked: list[Any] = []  # futures of the batch before: the judge's, the consistency server's
    with Background() as background, tqdm(total=len(dataset), unit="chain") as bar:
        for start in range(0, len(dataset), BATCH):
            batch, images = [], []
            for index in range(start, min(start + BATCH, len(dataset))):
                chain = dataset.chains[index]
                try:
                    images.append(load(dataset, index, folder, name))
                    batch.append(chain)
                except (ChainError, OSError, SyntaxError) as error:  # no file, or a broken one
                    left_out[chain.id] = str(error)
            results.append([future and future.result() for future in asked])
            bar.update(start - bar.n)
            scorers = (asks, looks) if batch else ()
            asked = [s and background.submit(s.score, batch, images) for s in scorers]
            shown += batch
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


class Measure(NamedTuple):
    """A number per turn, and what it is made of."""

    name: str
    statistic: Callable[..., Tensor]
    samples: tuple[Tensor, ...]  # each [B, N], NaN where there is no score
    counted: Tensor  # boolean [B, N], which of them it is about
    percent: bool = True


def measures(
    following: TurnScores | None, kept: ConsistencyScores | None, scale: Scale, terms: Terms
) -> list[Measure]:
    """List what can be measured with the scores at hand."""
    found = []
    if following is not None:
        success, valid = (following.score,), following.measured
        if scale == "likert":
            found.append(Measure("Likert, mean", content_consistency, success, valid, False))
        else:
            whole = valid.long().cumprod(dim=1).bool()
            so_far, own = of_valid(instruction_following), of_valid(marginal_success)
            found.append(Measure("IF: all turns so far", so_far, success, whole))
            found.append(Measure("Marginal: this turn", own, success, valid))
    if kept is not None:
        parts = tuple(getattr(kept, term) for term in TERMS[terms])
        scores = kept.scores if terms == "features" else kept.l1_scores
        some, means = scores.measured, (scores.score,)
        found.append(Measure("CC: mean of each term's mean", content_consistency, parts, some))
        found.append(Measure("CC: mean of the chains' means", content_consistency, means, some))
        if following is not None and scale == "binary":
            title = "Overall: of IF and the first CC"
            found.append(Measure(title, overall_of, success + parts, whole & some))
    return found


def of_valid(metric: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    """Let a metric of success and validity take NaN for what is not valid."""
    return lambda success: metric(success.nan_to_num(), valid=success.isfinite())


def overall_of(success: Tensor, *terms: Tensor) -> Tensor:
    """Overall(t) of instruction following and of consistency."""
    return overall(of_valid(instruction_following)(success), content_consistency(*terms))


def summarise(measure: Measure) -> dict[str, Any]:
    """Per turn: the estimate, its 95% interval over chains, and how many chains were scored."""
    generator = torch.Generator().manual_seed(0)
    interval = bootstrap_interval(measure.statistic, *measure.samples, generator=generator)
    unit = 100 if measure.percent else 1
    estimate, low, high = ([finite(unit * x) for x in value.tolist()] for value in interval)
    return {
        "estimate": estimate,
        "interval": list(zip(low, high, strict=True)),
        "chains": measure.counted.sum(dim=0).tolist(),
    }


def finite(value: float) -> float | None:
    """Round; None where nothing was measured, since JSON has no NaN."""
    return round(value, 2) if math.isfinite(value) else None


def details(
    shown: Sequence[Chain], following: TurnScores | None, consistency: ConsistencyScores | None
) -> list[dict[str, Any]]:
    """Every score of every chain; null where there is none, with the reason if it was lost."""
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
    """Print every measure, turn by turn."""
    table = Table(title="per turn [95% interval over chains] (chains scored)")
    table.add_column("")
    for turn in range(len(next(iter(table_of.values()))["estimate"])):
        table.add_column(f"turn {turn + 1}", justify="right")
    for name, row in table_of.items():
        cells = zip(row["estimate"], row["interval"], row["chains"], strict=True)
        table.add_row(
            name,
            *(
                f"none ({count})" if value is None else f"{value} [{low}, {high}] ({count})"
                for value, (low, high), count in cells
            ),
        )
    console.print(table)


def main(
    chains: Annotated[Path, typer.Argument(help="File of chains, of any format.")],
    edited: Annotated[Path, typer.Argument(help="Folder of what an editor made of them.")],
    judge: Annotated[
        list[str] | None, typer.Option(help="URL of a judge, ending in /v1; may be given again.")
    ] = None,
    model: Annotated[str, typer.Option(help="Name that the judge is known by.")] = "",
    consistency: Annotated[
        list[str] | None, typer.Option(help="URL of a server of mteditflow.rewards.server.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Where scores.json and the cache go.")] = Path(
        "runs/scores"
    ),
    name: Annotated[
        str, typer.Option(help="Files in the folder; {id}, {image} (its stem) and {turn}.")
    ] = "{image}_turn_{turn}.png",
    scope: Annotated[
        Literal["turn", "trajectory"], typer.Option(help="What one call of the judge is about.")
    ] = "turn",
    scale: Annotated[Scale, typer.Option(help="What the judge answers.")] = "binary",
    thinking: Annotated[bool, typer.Option(help="An analysis before each score.")] = True,
    answer_format: Annotated[
        Literal["json", "text"], typer.Option(help="text: for a server without structured output.")
    ] = "json",
    answer_tokens: AnswerTokens = None,
    reasoning_tokens: ReasoningTokens = 0,
    chat_template_kwargs: ChatTemplateKwargs = None,
    extra_body: ExtraBody = None,
    pairing: Annotated[
        Literal["reference", "consecutive"],
        typer.Option(help="What the image of a turn is compared with."),
    ] = "reference",
    terms: Annotated[Terms, typer.Option(help="What consistency compares.")] = "features",
    max_invalid: Annotated[
        float, typer.Option(min=0, max=1, help="Share of invalid chains that is an error.")
    ] = 0.2,
) -> None:
    """Score, print a table, write scores.json.

    The judge's key, if it wants one, is read from OPENAI_API_KEY, the server's token from
    MTEDITFLOW_TOKEN.
    """
    console = Console(width=None if Console().is_terminal else 120, highlight=False)
    if not judge and not consistency:
        raise typer.BadParameter("expected --judge, --consistency or both")
    if judge and not model:
        raise typer.BadParameter("expected --model, the name that the judge is known by")
    request = request_options(answer_tokens, reasoning_tokens, chat_template_kwargs, extra_body)
    try:
        reading = read_chains(chains, strict=False)
    except (ChainError, OSError) as error:
        raise typer.BadParameter(escape_controls(str(error))) from error
    prompt = JudgePrompt(scope, scale, thinking, answer_format)
    asks = looks = None
    try:
        with AnswerCache(output / "answers.sqlite") as cache:
            if judge:
                key = os.environ.get("OPENAI_API_KEY")
                client = ChatClient(judge, model, api_key=key, cache=cache, request=request)
                asks = Judge(client, prompt)
            if consistency:
                token = os.environ.get("MTEDITFLOW_TOKEN")
                looks = ConsistencyClient(consistency, pairing=pairing, token=token, cache=cache)
            found = score(ChainDataset(reading.chains), edited, name, asks, looks)
    except (KeyError, ValueError) as error:  # a URL, a pattern, a chain that names no objects
        raise typer.BadParameter(escape_controls(str(error))) from error
    shown, skipped, following, kept = found
    left_out = [*map(str, reading.skipped), *(f"{i}: {why}" for i, why in skipped.items())]
    for reason in left_out:
        console.print(f"left out: {escape_controls(reason)}", markup=False)
    console.print(f"{len(shown)} chains, {len(left_out)} left out")
    if not shown:
        raise typer.Exit(1)
    table = {each.name: summarise(each) for each in measures(following, kept, scale, terms)}
    own = kept and (kept.scores if terms == "features" else kept.l1_scores)
    scored = {"following": following, "consistency": own}
    report = {
        "summary": table,
        "invalid": {
            what: {"share": scores.invalid_share, "turns_by_reason": scores.reasons}
            for what, scores in scored.items()
            if scores is not None
        },
        "left_out": left_out,
        "judge": asks and asdict(prompt) | asks.client.settings,
        "pairing": pairing if consistency else None,
        "chains": details(shown, following, kept),
    }
    path = output / "scores.json"
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    show(table, console)
    console.print(f"Every score is in [bold]{escape_markup(str(path))}[/bold].")
    for what, scores in scored.items():
        if scores is not None and scores.reasons:
            reasons = ", ".join(f"{count} {reason}" for reason, count in scores.reasons.items())
            console.print(f"{what}: {scores.invalid_share:.1%} of chains invalid; turns: {reasons}")
    try:
        for scores in scored.values():
            if scores is not None:
                scores.require(max_invalid_share=max_invalid)
    except InvalidRewardsError as error:
        console.print(f"[red]error:[/red] {escape_markup(str(error))}")
        raise typer.Exit(1) from error


if __name__ == "__main__":
    typer.run(main)
