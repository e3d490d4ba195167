"""Evaluation of a run on held-out chains, with the same noise every time."""

from __future__ import annotations

from collections.abc import Sequence

from PIL.Image import Image

from mteditflow.chains import Chain
from mteditflow.evaluation import Evaluation, Provenance
from mteditflow.objectives import keyed_generator
from mteditflow.rewards import TurnScores
from mteditflow.training import gather_scores

from .held_out import HELD_OUT, HeldOut
from .loading import made_by
from .run import Run
from .sampling import collect
from .scoring import scale_of


def evaluate_if_due(run: Run) -> bool:
    """Evaluate before the first round, after the last, and every ``evaluation.every`` rounds.

    Returns:
        Whether an evaluation was made; a round that already has a complete one gets no other.
    """
    done, held_out = run.state.done, run.held_out
    if held_out is None or held_out.complete(done):
        return False
    if done not in (0, run.config.training.rounds) and done % run.config.evaluation.every:
        return False
    with run.log.stopwatch.phase("evaluating"):
        evaluate(run, held_out)
    return True


def evaluate(run: Run, held_out: HeldOut) -> None:
    """Edit and score all held-out chains with the evaluated policy; a collective call."""
    options, rows, waiting = run.config.evaluation, held_out.rows(), []
    with (
        run.policies.use(options.policy),
        run.log.bar("evaluation", len(rows), unit="chains") as bar,
    ):
        for start in range(0, len(rows), options.batch):
            part = rows[start : start + options.batch]
            chains, edited = edit_chains(run, held_out, part, purpose=HELD_OUT)
            waiting.append(run.submit(chains, edited))
            for row, images in zip(part, edited, strict=True):
                held_out.keep(run.state.done, row, images)
            bar.advance(len(part))
            run.stop_if_requested()
    terms, _ = gather_scores(collect(run, waiting), device=run.device)
    if run.main:
        # Ranks hold contiguous rows in order, so copies that pad the last ranks are at the end.
        records = held_out.chains.chains
        evaluation = Evaluation(
            round=run.state.done,
            chain_ids=[chain.id for chain in records],
            instructions=[chain.instructions for chain in records],
            terms={name: first_scores(x, len(records)) for name, x in terms.items()},
            success_at=scale_of(run.config.rewards).success,
            provenance=Provenance(
                judged_by=run.judged_by, made_by=made_by(run.config, run.state.done)
            ),
        )
        held_out.write(evaluation)
        run.accelerator.log(evaluation.numbers, step=run.state.done)
        run.log.message(f"round {run.state.done}, held out: {_last_turn(evaluation)}")
    run.accelerator.wait_for_everyone()


def edit_chains(
    run: Run, held_out: HeldOut, rows: Sequence[int], *, purpose: str
) -> tuple[list[Chain], list[list[Image | None]]]:
    """Edit the chains at some rows, each from noise that its row fixes.

    Returns:
        The chains, and the images [reference, turn 1, ..., turn N] of each.
    """
    examples = held_out.chains.__getitems__(rows)
    references = [example.image for example in examples]
    chains = [example.chain for example in examples]
    edited = run.editor.edit(
        references,
        [chain.instructions for chain in chains],
        generators=[keyed_generator(run.config.training.seed, purpose, row) for row in rows],
        batch=len(rows),
        call={"num_inference_steps": run.config.evaluation.steps},
        seen=[held_out.chains.seen(row, run.config.data.history) for row in rows],
    )
    return chains, [[first, *rest] for first, rest in zip(references, edited, strict=True)]


def first_scores(scores: TurnScores, count: int) -> TurnScores:
    """Return the scores of the first ``count`` trajectories, without the copies that pad ranks."""
    lost = {(b, n): reason for (b, n), reason in scores.lost.items() if b < count}
    return TurnScores(scores.score[:count], scores.turn_mask[:count], lost)


def _last_turn(evaluation: Evaluation) -> str:
    """Return the metrics of the last turn, each with its number of chains, as one line of text.

    Shares of chains are in percent and marked so; the other numbers are means of rewards.
    Intervals are in the report; their bootstrap at each evaluation would take longer.
    """
    unit = dict.fromkeys(evaluation.terms, "")  # all other metrics are in percent
    values = (
        f"{name} {value[-1]:.3g}{unit.get(name, '%')} ({evaluation.counts[name][-1]})"
        for name, value in evaluation.estimates.items()
    )
    return f"at turn {evaluation.turns} (over chains): {', '.join(values)}"
