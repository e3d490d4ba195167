"""Command line: plan the chains of a folder of images, and print statistics of chains."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from random import Random
from typing import Annotated, cast

import anyio
import typer
from rich.console import Console
from rich.table import Table

from mteditflow._command import OneLineGroup
from mteditflow._exits import failing, refusing
from mteditflow._hub import explaining_hub
from mteditflow._images import folder_images
from mteditflow._text import escape_markup
from mteditflow.chains import TaskType, read_chains
from mteditflow.planner.plan import (
    Planner,
    PlanningStoppedError,
    draw_tasks,
    planner_settings,
)
from mteditflow.planner.run import Planned, plan_images, planned_ids, writing
from mteditflow.planner.statistics import draw_statistics, statistics, statistics_table
from mteditflow.rewards.command_line import (
    QUESTION,
    AnswerTokens,
    ChatTemplateKwargs,
    ExtraBody,
    ReasoningTokens,
    check_device,
    check_source,
    read_secret,
    request_options,
    require_reachable,
)
from mteditflow.rewards.judge.preflight import reach_endpoints
from mteditflow.rewards.transport.cache import AnswerCache
from mteditflow.rewards.transport.chat import ChatClient

app = typer.Typer(
    cls=OneLineGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Plan chains of edits from images alone, and print statistics of chains.",
)
out = Console(highlight=False)


@app.command()
def plan(
    images: Annotated[Path, typer.Argument(help="Folder of images.")],
    output: Annotated[
        Path, typer.Argument(help="File of chains (.jsonl); an existing one is continued.")
    ],
    endpoint: Annotated[list[str], typer.Option(help="URL ending in /v1; may be repeated.")],
    model: Annotated[str, typer.Option(help="Name of the model at the endpoints.")],
    detector: Annotated[
        str, typer.Option(help="Hub id or path of a GroundingDINO detector.")
    ] = "IDEA-Research/grounding-dino-tiny",
    device: Annotated[str, typer.Option(help="Device of the detector.")] = "cpu",
    turns: Annotated[int, typer.Option(help="Edits in a chain.")] = 3,
    chains_per_image: Annotated[
        int, typer.Option(min=1, help="Chains planned for each image.")
    ] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the draw of edit types.")] = 0,
    weight: Annotated[
        list[str] | None,
        typer.Option(help="TYPE=NUMBER; may be repeated. Types that are not given are not drawn."),
    ] = None,
    temperature: Annotated[float, typer.Option(help="Sampling temperature of the model.")] = 0.7,
    answer_tokens: AnswerTokens = None,
    reasoning_tokens: ReasoningTokens = 0,
    chat_template_kwargs: ChatTemplateKwargs = None,
    extra_body: ExtraBody = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Most images at a time.")] = 16,
    attempts: Annotated[int, typer.Option(help="Most attempts for one question.")] = 4,
    timeout: Annotated[float, typer.Option(help="Timeout of one attempt, in seconds.")] = 120.0,
    cache: Annotated[Path | None, typer.Option(help="File that caches accepted answers.")] = None,
) -> None:
    """Plan chains for every image of a folder; a stopped run is resumed.

    The API key of the endpoints, if they need one, is read from OPENAI_API_KEY. Folder, file,
    options and endpoints are checked before the detector is loaded or downloaded.
    """
    request = request_options(answer_tokens, reasoning_tokens, chat_template_kwargs, extra_body)
    with ExitStack() as stack:
        with refusing():
            weights = _weights(weight)
            draw_tasks(Random(seed), turns, weights)
            folder_images(images)
            connect = partial(
                ChatClient,
                endpoint,
                model,
                api_key=read_secret("OPENAI_API_KEY"),
                temperature=temperature,
                request=request,
                concurrency=concurrency,
                attempts=attempts,
                timeout=timeout,
            )
            planned_ids(planner_settings(connect(), turns, seed, weights), output)
            check_source("detector", detector, "config.json")
            check_device("device", device)
            asked = connect(attempts=2, timeout=min(timeout, QUESTION))
            require_reachable("endpoint", anyio.run(reach_endpoints, asked))
            logging.basicConfig(format="%(asctime)s %(levelname)s: %(message)s")
            client = connect(cache=None if cache is None else AnswerCache(cache))
            stack.enter_context(writing(output))
            from mteditflow.rewards.consistency.models import GroundingDino  # slow to import

            with explaining_hub("detector", detector):
                finder = GroundingDino.from_pretrained(detector, device=device)
        planner = Planner(client, finder, turns=turns, seed=seed, weights=weights)
        run = partial(
            plan_images,
            chains_per_image=chains_per_image,
            images_in_flight=concurrency,
            progress=True,
        )
        with failing(PlanningStoppedError, ValueError):
            planned = anyio.run(run, planner, images, output)
    out.print(_summary(planned))
    out.print(statistics_table(statistics(planned.chains)))


@app.command()
def stats(
    chains: Annotated[Path, typer.Argument(help="File of chains, of any format.")],
    plot: Annotated[Path | None, typer.Option(help="File of a figure, .png or .pdf.")] = None,
) -> None:
    """Count edit types, object categories and turns of chains."""
    with refusing():
        counted = statistics(read_chains(chains, allow_outside=True).chains)
        if plot is not None:
            draw_statistics(counted, plot)
    out.print(statistics_table(counted))


def _weights(given: list[str] | None) -> Mapping[TaskType, float] | None:
    """Parse TYPE=NUMBER; ``draw_tasks`` checks the types.

    Raises:
        ValueError: an entry has another form.
    """
    if not given:
        return None
    pairs = (text.partition("=") for text in given)
    try:
        return {cast(TaskType, task): float(number) for task, _, number in pairs}
    except ValueError as error:
        raise ValueError(f"weight: expected TYPE=NUMBER, got {' '.join(given)}") from error


def _summary(planned: Planned) -> Table:
    table = Table(title="Planned")
    table.add_column("")
    table.add_column("chains", justify="right")
    table.add_row("planned", str(len(planned.chains)))
    for reason, count in planned.refused.items():
        table.add_row(f"refused, {escape_markup(reason)}", str(count))
    return table


if __name__ == "__main__":
    app(prog_name="python -m mteditflow.planner")
