"""Commands that score sessions by the protocol of a public benchmark: LME, MSE, MICE.

A command fails before any request if a session lacks an image. It fails without a report if an
answer of the judge is missing; accepted answers stay in the output folder, and the same command
requests only the others.
"""

from __future__ import annotations

from collections.abc import Awaitable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from mteditflow._exits import refusing
from mteditflow.chains import Chain
from mteditflow.evaluation import JudgedBy
from mteditflow.evaluation.benchmarks import (
    EdiValJudge,
    LmeScores,
    MiceScores,
    Session,
    SessionScores,
    read_sessions,
    report_lme,
    report_mice,
    report_mse,
    score_lme,
    score_mice,
    score_mse,
)
from mteditflow.evaluation.benchmarks.edival import questions_version
from mteditflow.evaluation.benchmarks.lme import damage_request, following_request
from mteditflow.evaluation.benchmarks.mice import (
    TEMPERATURE,
    VOTES,
    awareness_request,
    require_fields,
)
from mteditflow.evaluation.benchmarks.mse import ENOUGH, mse_request
from mteditflow.evaluation.provenance import version_of
from mteditflow.rewards import BINARY, AnswerCache, ChatClient, Scale, TurnScores
from mteditflow.rewards.command_line import (
    AnswerTokens,
    ChatTemplateKwargs,
    ExtraBody,
    ReasoningTokens,
    check_source,
    request_options,
)

from .session_runs import Protocol, Service, consistency_client, run

File = Annotated[Path, typer.Argument(help="File of sessions, in any supported format.")]
Edited = Annotated[Path, typer.Argument(help="Folder of an editor's images.")]
Judges = Annotated[
    list[str], typer.Option("--judge", help="URL that ends in /v1; may be repeated.")
]
Model = Annotated[str, typer.Option(help="Model name sent to the judge.")]
Sources = Annotated[
    Path | None, typer.Option(help="Folder of the source images. Default: the file's.")
]
Outside = Annotated[
    bool, typer.Option("--allow-outside", help="Allow source images outside their folder.")
]
Output = Annotated[Path, typer.Option(help="Folder of the report and of the judge's answers.")]
Patience = Annotated[
    float, typer.Option(min=0, help="Longest wait for an unreachable judge, seconds.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]
OUTPUT = Path("runs/sessions")
OF_TEN = Scale(0, 10, success=ENOUGH, whole=True)
# Sample session whose questions are hashed, as the version of a judge's prompts in reports.
SAMPLE = Session(
    Chain(
        id="a",
        image="a.png",
        instructions=("Instruction A", "Instruction B"),
        formatted_instructions=("Edit [A]", "Edit [B]"),
    ),
    (),
)
URLS = ("image:0", "image:1", "image:2")


def lme(
    file: File,
    edited: Edited,
    judge: Judges,
    model: Model,
    images: Sources = None,
    allow_outside: Outside = False,
    output: Output = OUTPUT,
    answer_tokens: AnswerTokens = None,
    reasoning_tokens: ReasoningTokens = 0,
    chat_template_kwargs: ChatTemplateKwargs = None,
    extra_body: ExtraBody = None,
    patience: Patience = 300.0,
    as_json: AsJson = False,
) -> None:
    """LME-Bench: how long sessions succeed (SR@k), and when their images collapse (CR@k)."""
    with refusing(), ExitStack() as stack:
        request = request_options(answer_tokens, reasoning_tokens, chat_template_kwargs, extra_body)
        service = Service(judge, model, request, patience)
        sessions = read_sessions(file, edited, images=images, allow_outside=allow_outside)

        def score(cache: AnswerCache) -> Awaitable[LmeScores]:
            return score_lme(service.client(cache), sessions, progress=Console().is_terminal)

        wording = [ask(SAMPLE, URLS, 2) for ask in (following_request, damage_request)]
        by = _judged_by(service, version_of(wording), "lme", OF_TEN)
        protocol = Protocol("lme", by, score, report_lme, _lme_details)
        run(protocol, service, sessions, output, as_json, stack)


def mse(
    file: File,
    edited: Edited,
    judge: Judges,
    model: Model,
    images: Sources = None,
    allow_outside: Outside = False,
    output: Output = OUTPUT,
    answer_tokens: AnswerTokens = None,
    reasoning_tokens: ReasoningTokens = 0,
    chat_template_kwargs: ChatTemplateKwargs = None,
    extra_body: ExtraBody = None,
    patience: Patience = 300.0,
    as_json: AsJson = False,
) -> None:
    """MSE-Bench: share of sessions whose turns 1 to k all succeed (SR@k)."""
    with refusing(), ExitStack() as stack:
        request = request_options(answer_tokens, reasoning_tokens, chat_template_kwargs, extra_body)
        service = Service(judge, model, request, patience)
        sessions = read_sessions(file, edited, images=images, allow_outside=allow_outside)

        def score(cache: AnswerCache) -> Awaitable[SessionScores]:
            return score_mse(service.client(cache), sessions, progress=Console().is_terminal)

        by = _judged_by(service, version_of([mse_request(SAMPLE, URLS, 2)]), "mse", OF_TEN)
        details = partial(_table_details, "following")
        run(
            Protocol("mse", by, score, report_mse, details),
            service,
            sessions,
            output,
            as_json,
            stack,
        )


def mice(
    file: File,
    edited: Edited,
    judge: Judges,
    model: Model,
    split: Annotated[
        Literal["cm", "cu"], typer.Option(help="cm: a rule at turn 1 (GA); cu: pronouns (CU).")
    ],
    votes: Annotated[
        int, typer.Option(min=1, help="Answers per turn of GA or CU; their mean counts.")
    ] = VOTES,
    detector: Annotated[
        str | None, typer.Option(help="Grounding DINO, path or hub id; without it no IF.")
    ] = None,
    consistency: Annotated[
        list[str] | None,
        typer.Option(help="Consistency server's URL, ending in /v1; without it no CC."),
    ] = None,
    half_for_missing: Annotated[
        bool,
        typer.Option("--half-for-missing", help="CC 0.5 without objects, as in Edit-R2's code."),
    ] = False,
    images: Sources = None,
    allow_outside: Outside = False,
    output: Output = OUTPUT,
    answer_tokens: AnswerTokens = None,
    reasoning_tokens: ReasoningTokens = 0,
    chat_template_kwargs: ChatTemplateKwargs = None,
    extra_body: ExtraBody = None,
    patience: Patience = 300.0,
    as_json: AsJson = False,
) -> None:
    """MICE-Bench of Edit-R2: GA or CU, with IF by a detector and CC by a consistency server."""
    with refusing(), ExitStack() as stack:
        request = request_options(answer_tokens, reasoning_tokens, chat_template_kwargs, extra_body)
        service, servers = Service(judge, model, request, patience), consistency or []
        if half_for_missing and not servers:
            raise ValueError("--half-for-missing: expected --consistency with it")
        if detector is not None:
            check_source("--detector", detector, "config.json")
        if servers:
            consistency_client(servers)  # refuses a bad URL
        sessions = read_sessions(file, edited, images=images, allow_outside=allow_outside)
        require_fields(sessions, split=split, objects=bool(servers))

        async def score(cache: AnswerCache) -> MiceScores:
            checks = None if detector is None else _checks(service.client(cache), detector)
            return await score_mice(
                service.client(cache, temperature=TEMPERATURE),
                sessions,
                split=split,
                votes=votes,
                checks=checks,
                consistency=consistency_client(servers, cache=cache) if servers else None,
                progress=Console().is_terminal,
            )

        wording = version_of([awareness_request(split, SAMPLE, URLS, 2)])
        if detector is not None:
            wording += f"+{questions_version()}"
        by = _judged_by(service, wording, f"mice-{split}, {votes} votes", BINARY)
        terms = {"terms": "features", "pairing": "reference"} if servers else {}
        by = by.model_copy(update={"detector": detector, **terms})
        report = partial(report_mice, missing=0.5 if half_for_missing else None)
        protocol = Protocol(f"mice_{split}", by, score, report, _mice_details, servers)
        run(protocol, service, sessions, output, as_json, stack)


def _judged_by(service: Service, wording: str, checks: str, scale: Scale) -> JudgedBy:
    return JudgedBy(
        judge=service.model,
        prompt=wording,
        request=service.request.stated,
        scope="turn",
        scale=scale,
        checks=checks,
    )


def _checks(client: ChatClient, detector: str) -> EdiValJudge:
    from accelerate import PartialState

    from mteditflow.rewards import GroundingDino  # transformers takes its time to import

    found = GroundingDino.from_pretrained(detector, device=PartialState().device)
    return EdiValJudge(client, found)


def _by_session(found: SessionScores) -> dict[str, dict[str, list[float]]]:
    scores: dict[str, dict[str, list[float]]] = {x.chain.id: {} for x in found.sessions}
    for (name, turn), own in found.scores.items():
        scores[name][str(turn)] = list(own)
    return scores


def _table_details(name: str, found: SessionScores) -> dict[str, Any]:
    return {name: _by_session(found)}


def _lme_details(found: LmeScores) -> dict[str, Any]:
    return {"following": _by_session(found.following), "damage": _by_session(found.damage)}


def _mice_details(found: MiceScores) -> dict[str, Any]:
    sessions = [x.chain.id for x in found.awareness.sessions]

    def rows_of(scores: TurnScores | None) -> dict[str, list[float | None]] | None:
        if scores is None:
            return None
        values = [[x if x == x else None for x in row] for row in scores.score.tolist()]
        return dict(zip(sessions, values, strict=True))

    own = {"following": rows_of(found.following), "consistency": rows_of(found.consistency)}
    return {"awareness": _by_session(found.awareness), **own}
