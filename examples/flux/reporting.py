"""Logs, pictures and reports of a run, and circuit breakers on its rewards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from PIL.Image import Image
from torch import Tensor

from mteditflow import Signal
from mteditflow.chains import ChainError, InformativeSampler
from mteditflow.rewards import InvalidRewardsError
from mteditflow.training import (
    Bar,
    RewardCollapseError,
    print_summary,
    run_report,
    summary_text,
    write_report,
)

from .config import IDENTITY
from .config_values import flat
from .gating import UNCERTAINTY
from .run import FlatRewardsError, Run
from .scoring import scale_of

FLAT_WARNED = 3  # rounds in a row whose rewards train nothing, after which the log warns
DRIFT = "drift/outside_band"  # number of statistics outside their bands
CHANGE = "chains/change"  # mean absolute pixel change of identity turns, 0 to 255

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mteditflow.evaluation import Evaluation
    from mteditflow.training import RoundRewards

    from .sampling import RoundChains, Scores


def log_rewards(run: Run, rewards: RoundRewards) -> None:
    """Add the rewards of all ranks to the round's metrics, and draw histograms if due."""
    counts = rewards.informative("following").counts
    run.numbers |= rewards.numbers()
    _warn_of_absent(run, rewards)
    run.numbers |= {f"groups/{reason}": count for reason, count in counts.items()}
    run.numbers |= {f"multiplier/{name}": x for name, x in run.state.multipliers.items()}
    if run.state.kl is not None:
        run.numbers["training/kl_coef"] = run.state.kl.value
    if IDENTITY in rewards.terms:
        still = rewards.terms[IDENTITY].score
        run.numbers[CHANGE] = 255 * (1 - float(still[still.isfinite()].double().mean()))
    if pictures_due(run):
        from mteditflow.training.pictures import draw_histograms

        title = f"Rewards of round {run.state.done + 1}"
        shown = {name: rewards.reward(name) for name in rewards.names}
        draw(run, "rewards", draw_histograms(shown, rewards.group, title=title))


def _warn_of_absent(run: Run, rewards: RoundRewards) -> None:
    """Log rewards that no trajectory of the round has, once per process and reward.

    A reward of which all scores are lost is no such reward: ``rewards.max_invalid`` counts it.
    """
    for name in [name for name in rewards.absent if name not in run.absent]:
        share = rewards.terms[name].unmeasured_share
        if share == 0:
            continue
        run.absent.add(name)
        run.log.warning(
            f"round {run.state.done + 1}: no trajectory has the reward {name} ({share:.0%} had "
            "nothing to measure), so it has no effect there; the report counts such rounds"
        )


def refuse_unsound_rewards(run: Run, rewards: RoundRewards) -> None:
    """Raise if too many rewards are lost, or a reward collapses.

    Raises:
        InvalidRewardsError: more than ``rewards.max_invalid`` of the trajectories lack a reward.
        RewardCollapseError: a reward fell below its best by ``safety.collapse_drop``.
    """
    name = ""
    try:
        for name in rewards.names:
            rewards.terms[name].require(max_invalid_share=run.config.rewards.max_invalid)
    except InvalidRewardsError as error:
        raise InvalidRewardsError(f"rewards.max_invalid: {name}: {error}") from error
    before = run.watch.state_dict()
    try:
        run.watch.check(rewards.means)
    except RewardCollapseError:
        run.watch.load_state_dict(before)  # a resumed run repeats this round; count it once
        raise


def carry_over(
    run: Run,
    rewards: RoundRewards | None,
    signals: Mapping[str, Signal] | None = None,
    group: Tensor | None = None,
) -> None:
    """Update the state for the next round: sampler, floor, history, KL coefficient, gate, turns.

    Args:
        run: the run.
        rewards: rewards of the chains that the sampler drew; None for objectives without rewards.
        signals: credit of each turn of the trained chains, by name.
        group: group ids of the trained chains, [B]; None: the groups of ``rewards``.
    """
    state = run.state
    if state.history is not None and rewards is not None and signals:
        trained = rewards.group if group is None else group
        state.history = state.history.updated(signals, trained)
    if isinstance(run.sampler, InformativeSampler):
        run.sampler.step({} if rewards is None else rewards.spreads("following"))
    else:
        run.sampler.step()
    consistency = math.nan if rewards is None else rewards.means.get("consistency", math.nan)
    if state.floor is not None and math.isfinite(consistency):
        state.floor = state.floor.update(consistency)
    # Updates without a finite KL, such as skipped ones, do not count.
    kls = [means["kl"] for means in run.means if math.isfinite(means.get("kl", math.nan))]
    if state.kl is not None and kls:
        state.kl = state.kl.update(sum(kls) / len(kls))
    uncertainty = run.numbers.get(UNCERTAINTY, math.nan)
    if state.gate is not None and math.isfinite(uncertainty):
        state.gate = state.gate.update(uncertainty)
    change = run.numbers.get(CHANGE, math.nan)
    if state.depth is not None and math.isfinite(change):
        state.depth = state.depth.update(change)


def refuse_flat_rewards(run: Run, rewards: RoundRewards, advantage: Tensor, valid: Tensor) -> None:
    """Count rounds in a row whose rewards train nothing; warn after some, and raise after more.

    Args:
        run: the run.
        rewards: rewards that the advantages are of.
        advantage: advantage of each turn over all ranks, [B, N].
        valid: turns to train on, boolean [B, N].

    Raises:
        FlatRewardsError: ``safety.max_flat`` rounds in a row trained nothing.
    """
    state, most = run.state, run.config.safety.max_flat
    if bool((advantage[valid] != 0).any()):
        state.flat = 0
        return
    count, run.flat_rewards = state.flat + 1, _flat_rewards(rewards)
    if most is not None and count >= most:  # state.flat stays: a resumed run repeats this round
        raise FlatRewardsError(f"safety.max_flat: {_untrained(count)}: {run.flat_rewards}")
    state.flat = count
    if count == FLAT_WARNED:
        end = "" if most is None else f"; after {most} the run stops (safety.max_flat)"
        run.log.warning(f"round {state.done + 1}: {_untrained(count)}: {run.flat_rewards}{end}")


def _untrained(count: int) -> str:
    rounds = "the last round" if count == 1 else f"{count} rounds in a row"
    return f"expected rewards that differ within a group, got none in {rounds}"


def _flat_rewards(rewards: RoundRewards) -> str:
    """Return the reason why rewards train nothing, and where to look, in one line."""
    facts = []
    for name in rewards.names:
        terms, spreads = rewards.terms[name], rewards.spreads(name).values()
        if rewards.reward(name).measured.any():
            spread = f"standard deviation in groups at most {max(spreads, default=0.0):.3g}"
            facts.append(f"{name}: mean {rewards.means[name]:.3g}, {spread}")
        else:
            missing = f"{terms.unmeasured_share:.0%} NaN, {terms.invalid_share:.0%} lost"
            facts.append(f"{name}: no score in {len(terms)} trajectories ({missing})")
    return (
        f"{'; '.join(facts)}. Does the scorer tell the members of a group apart? Look at the "
        "pictures, and at score/..., groups/... and lost/... in metrics.jsonl. NaN means nothing "
        "to measure, Lost that there was no answer"
    )


def refuse_untrained(run: Run) -> None:
    """Raise at the end of a run if the rewards of none of its rounds trained anything.

    Raises:
        FlatRewardsError: no round did, and ``safety.max_flat`` is not None.
    """
    state = run.state
    if run.config.safety.max_flat is not None and 0 < state.done == state.flat:
        facts = f": {run.flat_rewards}" if run.flat_rewards else ""
        raise FlatRewardsError(
            f"safety.max_flat: {_untrained(state.flat)}, all of this run, which took "
            f"{state.updates} optimizer steps{facts}"
        )


def record(run: Run, bar: Bar) -> None:
    """Write the metrics of the finished round: means over its updates, and all other numbers."""
    numbers = _write_line(run, run.state.done)
    rewards = [name for name in run.config.rewards.weights if f"reward/{name}" in numbers]
    bar.note(", ".join(f"{name} {numbers[f'reward/{name}']:.2f}" for name in rewards))


def record_stopped(run: Run) -> None:
    """Write the metrics of the round that the run stops in; a resumed run repeats and rewrites it.

    A full disk is ignored, so that it does not hide the reason of the stop.
    """
    with suppress(OSError):
        _write_line(run, run.state.done + 1)


def _write_line(run: Run, number: int) -> dict[str, float]:
    """Write the numbers of a round to ``metrics.jsonl`` and the trackers, and return them."""
    for name in dict.fromkeys(name for means in run.means for name in means):
        values = [means[name] for means in run.means if name in means]
        run.numbers[f"training/{name}"] = sum(values) / len(values)
    run.numbers["training/skipped_updates"] = run.state.skipped
    if run.state.reset is not None:
        run.numbers["training/reference_resets"] = run.state.resets
    numbers = run.log.record(number, run.numbers)
    run.accelerator.log(numbers, step=number)
    return numbers


def show_chains(
    run: Run, drawn: RoundChains, images: Sequence[Sequence[Image | None]], scores: Scores
) -> None:
    """Draw three members of each of this rank's first two chains, if due."""
    if not pictures_due(run):
        return
    from mteditflow.training.pictures import Strip, draw_strips

    ids = list(dict.fromkeys(chain.id for chain in drawn.chains))[:2]
    members = ([b for b, chain in enumerate(drawn.chains) if chain.id == name][:3] for name in ids)
    strips = [
        Strip(
            drawn.chains[b].id,
            drawn.instructions[b],
            images[b],
            scores,
            b,
            label=f"member {i}",
        )
        for rows in members
        for i, b in enumerate(rows, start=1)
    ]
    success, title = (
        scale_of(run.config.rewards).success,
        f"Round {run.state.done + 1}: {len(ids)} of its chains",
    )
    draw(run, "chains", draw_strips(strips, success_at=success, title=title))


def pictures_due(run: Run) -> bool:
    """Whether this rank draws pictures of this round."""
    every = run.config.output.strips_every
    return every > 0 and run.state.done % every == 0 and run.main


def draw(run: Run, name: str, figure: Figure) -> None:
    """Write a figure to the run's folder, and log it to the trackers.

    A picture that cannot be written, as on a full disk, is a warning: it must not cost the round.
    """
    from mteditflow.training.pictures import log_pictures, write_picture

    number, folder = run.state.done + 1, run.config.output.folder / "pictures"
    try:
        with run.log.stopwatch.phase("drawing"):
            write_picture(figure, folder / f"round-{number:06d}-{name}.png")
            log_pictures(run.accelerator.trackers, {name: figure}, step=number)
    except OSError as error:
        with suppress(OSError):  # the log's disk may be full, too; the terminal shows the line
            run.log.warning(f"round {number}: the picture {name} is not written: {error}")


def summarize(run: Run) -> None:
    """Write and print the report of the whole run, with its pictures."""
    if not run.main:
        return
    from mteditflow.training.pictures import draw_curves, draw_drift, write_chart

    folder, metrics = run.config.output.folder, run.log.metrics
    evaluations = run.held_out.all() if run.held_out else []
    model = "/".join(Path(run.config.model.path).parts[-2:])
    title = f"{model}, {run.method}"
    curves = draw_curves(metrics, evaluations, title=title, changes=run.changes)
    write_chart(curves, folder / "curves.png")
    if any(DRIFT in line for line in metrics):
        panels = draw_drift(
            metrics,
            run.alarms,
            watch=run.drift,
            early=run.config.safety.drift_rounds,
            title=f"Pictures of {title}; these statistics train nothing",
        )
        write_chart(panels, folder / "drift.png")
    if len(evaluations) < 2:
        why = "evaluated once, so there is" if run.held_out else "no held-out chains, so"
        run.log.message(f"{run.state.done} rounds done; {why} no report")
        _warn_of_stale(run, "chains.png", "report.json")
        return
    before, after = evaluations[0], evaluations[-1]
    if before.round:
        run.log.warning(f"no evaluation of round 0: before is round {before.round}")
    _draw_chains(run, before, after)
    report = run_report(
        before,
        after,
        metrics,
        config=flat(run.config),
        seed=run.config.training.seed,
        changes=run.changes,
        alarms=run.alarms,
    )
    write_report(folder, report)
    print_summary(report, folder)
    run.log.message(summary_text(report, folder).rstrip(), aloud=False)


def _draw_chains(run: Run, before: Evaluation, after: Evaluation) -> None:
    """Draw held-out chains before and after training; warn if images are missing."""
    from mteditflow.training.pictures import draw_before_after, write_picture

    assert run.held_out is not None
    figure = None
    try:
        images = (run.held_out.images(e.round) for e in (before, after))
        figure = draw_before_after(before, after, *images)
    except ChainError as error:
        gone = {e.round: run.held_out.without_images(e.round) for e in (before, after)}
        which = "; ".join(f"round {n}: {', '.join(ids)}" for n, ids in gone.items() if ids)
        run.log.warning(f"chains.png is not drawn: {error}; chains without images: {which}")
    if figure is None:
        _warn_of_stale(run, "chains.png")
    else:
        write_picture(figure, run.config.output.folder / "chains.png")


def _warn_of_stale(run: Run, *names: str) -> None:
    """Warn of files that an earlier end of the run wrote and this one did not replace."""
    folder = run.config.output.folder
    if left := [name for name in names if (folder / name).exists()]:
        run.log.warning(f"{folder}: left from an earlier end of the run: {', '.join(left)}")
