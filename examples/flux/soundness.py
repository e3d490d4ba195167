"""Refuse conflicting options and options without effect, before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from mteditflow.objectives import OBJECTIVES, ForwardObjective
from mteditflow.rewards import SCALES

from .config import (
    CONSECUTIVE,
    IDENTITY,
    RESUME,
    SERVED,
    Config,
    ConfigError,
    DistillationConfig,
    Rewards,
)
from .config_values import name_of


def checked(config: Config, base: Config | None = None, *, services: bool = True) -> Config:
    """Return a configuration unchanged if it can be run.

    Args:
        config: fields of the right types.
        base: the preset below the command line: a field may differ from it only where it has an
            effect. None: the defaults.
        services: whether a judge or scorer is required.

    Raises:
        ConfigError: one line per wrong field.
    """
    problems = [*_unsound(config), *_ignored(config, base or type(config)())]
    problems += _unserved(config.rewards, config.gate.auxiliary) if services else []
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def _unsound(config: Config) -> Iterator[str]:
    """Yield a message for each field that is out of range or conflicts with another."""
    data, training, objective = config.data, config.training, config.objective
    rewards, evaluation = config.rewards, config.evaluation
    name, card = name_of(objective), objective.card
    if card.whole_groups and data.split_groups:
        yield f"data.split_groups: expected False for {name}, which needs whole groups on a rank"
    try:
        objective.sampling(0, steps=config.sampling.steps)
    except ValueError as error:
        yield f"objective.{error}"
    if config.sampling.few_steps and not isinstance(objective, ForwardObjective):
        yield (
            f"{config.sampling.few_steps}: expected None for {name}, which trains on the steps of "
            "the model that sampled; objectives that re-noise need none of them"
        )
    if data.fit == "buckets" and isinstance(config, DistillationConfig):
        yield "data.fit: expected square for distillation, got buckets"
    if training.stop_kl is not None and not card.old_kl:
        yield f"training.stop_kl: expected None for {name}, which has no old_kl"
    if training.warmup_rounds >= training.rounds:
        yield (
            f"training.warmup_rounds: expected fewer than the {training.rounds} rounds, got "
            f"{training.warmup_rounds}"
        )
    if training.schedule == "cosine" and training.final_rate == 1:
        yield "training.final_rate: expected below 1 for schedule cosine, such as 0.1, got 1"
    if training.kl_target is not None and getattr(objective, "kl_coef", 0) == 0:
        yield "training.kl_target: expected objective.kl_coef above 0 to start from, got 0"
    if training.kl_target is not None and getattr(objective, "kl_floor", None) is not None:
        yield (
            "training.kl_target: expected None beside objective.kl_floor, since an adapted kl_coef "
            f"may fall below it, got {training.kl_target}"
        )
    unknown = [name for name, x in rewards.weights.items() if x and name not in SERVED]
    if rewards.scorer is None and unknown:
        yield (
            f"rewards.weights: expected names among {', '.join(SERVED)}, or a scorer that gives "
            f"others, got {unknown[0]}"
        )
    if not any(rewards.weights.values()) or min(rewards.weights.values()) < 0:
        yield f"rewards.weights: expected weights >= 0, one of them above, got {rewards.weights}"
    yield from _unsound_lengths(config)
    yield from _unsound_regions(config)
    yield from _unsound_gate(config)
    yield from _unsound_reset(config)
    if data.extra_groups and data.fit == "buckets":
        yield "data.extra_groups: expected 0 where data.fit is buckets"
    if data.extra_groups and config.model.shard != "none":
        yield (
            "data.extra_groups: expected 0 where model.shard is given, since ranks sample "
            f"different numbers of groups, got {data.extra_groups}"
        )
    if rewards.scorer is not None and (rewards.judge or rewards.consistency):
        yield (
            "rewards.scorer: expected no judge and no consistency beside it, got "
            f"{rewards.scorer!r}; to score by them, give --rewards.scorer None"
        )
    if rewards.scorer is None or rewards.scale is not None:
        try:
            SCALES[rewards.scale or "likert"].with_success(rewards.success)
        except ValueError as error:
            yield f"rewards.{error}, on the scale {rewards.scale or 'likert'}"
    try:
        _ = rewards.request  # RequestOptions checks its fields on creation
    except ValueError as error:
        yield f"rewards.{error}"
    if evaluation.policy == "ema" and training.ema_decay == 0:
        yield "evaluation.policy: expected current or old, since ema_decay = 0 keeps no average"
    if config.output.resume not in RESUME and not os.path.isdir(config.output.resume):
        yield (
            f"output.resume: expected auto, best, never or the folder of a checkpoint, got "
            f"{config.output.resume!r}"
        )
    if data.groups * data.group_size % training.minibatches:
        yield (
            f"training.minibatches: expected a divisor of the {data.groups * data.group_size} "
            f"trajectories of a round, got {training.minibatches}"
        )


def _unsound_lengths(config: Config) -> Iterator[str]:
    """Yield a message for each conflict among chain length, growth and identity turns."""
    data, growth, rewards, most = config.data, config.growth, config.rewards, config.most_turns
    name = "data.drift" if config.drifts else "data.turns"
    if growth.first is not None:
        if growth.first >= most:
            yield f"growth.first: expected fewer than the {most} of {name}, got {growth.first}"
        if (growth.every is None) == (growth.change is None):
            yield (
                f"growth: expected every or change beside first, got {growth.every} and "
                f"{growth.change}"
            )
        if growth.every is not None and growth.every >= config.training.rounds:
            yield (
                f"growth.every: expected fewer than the {config.training.rounds} of "
                f"training.rounds, else no chain grows, got {growth.every}"
            )
        if growth.change is not None and not (config.drifts or data.identity_share > 0):
            yield (
                "growth.change: expected data.identity_share above 0, or mt_opsd, whose turns "
                f"without a change it measures, got {growth.change}"
            )
    if config.drifts and data.history != "last":
        yield f"data.history: expected last for mt_opsd, got {data.history}"
    weight = rewards.weights.get(IDENTITY, 0.0)
    if data.identity_share == 1:
        yield "data.identity_share: expected below 1, so that there are edits to train, got 1"
    if (data.identity_share > 0) != (weight > 0) and config.objective.card.rewarded:
        yield (
            "data.identity_share, rewards.weights.identity: expected both above 0 or neither, got "
            f"{data.identity_share} and {weight}"
        )
    if data.identity_share > 0 and rewards.fusion == "rewards":
        yield (
            "rewards.fusion: expected advantages where data.identity_share is above 0, since no "
            "turn has all rewards, got rewards"
        )
    if rewards.consistency and rewards.weights.get(CONSECUTIVE) and rewards.pairing != "both":
        yield (
            "rewards.weights.consecutive: expected rewards.pairing both, which has this reward, "
            f"got {rewards.pairing}"
        )
    if rewards.pairing == "both" and data.turns == 1:
        yield "rewards.pairing: expected data.turns above 1, where both differ, got both"


def _unsound_regions(config: Config) -> Iterator[str]:
    """Yield a message for each option that conflicts with per-token advantages."""
    rewards, objective = config.rewards, config.objective
    if not rewards.regions or not objective.card.rewarded:
        return
    if not objective.card.tokens:
        names = [name for name, kind in OBJECTIVES.items() if kind.card.tokens]
        yield (
            f"rewards.regions: expected an objective that takes advantages of tokens, one of "
            f"{names}, got {name_of(objective)}"
        )
    if rewards.fusion == "rewards":
        yield (
            "rewards.fusion: expected advantages where rewards.regions is on, since a sum of "
            "rewards has no region, got rewards"
        )
    if rewards.scorer is None:
        yield (
            "rewards.regions: expected a rewards.scorer that gives regions; judge and consistency "
            "server give none"
        )
    if config.data.fit == "buckets":
        yield "rewards.regions: expected data.fit square, got buckets"


def _unsound_gate(config: Config) -> Iterator[str]:
    """Yield a message for each option that a gated KL does not go with."""
    gate, rewards, objective = config.gate, config.rewards, config.objective
    if not gate.auxiliary or not objective.card.rewarded:
        return
    if not gate.minimum <= gate.share <= gate.maximum:
        yield (
            f"gate.share: expected between gate.minimum {gate.minimum} and gate.maximum "
            f"{gate.maximum}, got {gate.share}"
        )
    if getattr(objective, "kl_coef", 0) == 0:
        yield "gate.auxiliary: expected objective.kl_coef above 0, whose KL is gated, got 0"
    if objective.whole_kl:
        yield (
            f"gate.auxiliary: expected no value for {name_of(objective)}, {objective.whole_kl}, "
            f"got {list(gate.auxiliary)}"
        )
    if getattr(objective, "norm_coef", 0) > 0:
        yield (
            "gate.auxiliary: expected objective.norm_coef 0, whose hinge evaluates the reference "
            f"everywhere, got {getattr(objective, 'norm_coef', 0)}"
        )
    if config.training.kl_target is not None:
        yield (
            "training.kl_target: expected None beside gate.auxiliary, whose share already follows "
            f"the rewards, got {config.training.kl_target}"
        )
    trained = {name for name, weight in rewards.weights.items() if weight > 0}
    trained |= {"consistency"} if rewards.floor is not None else set()
    served = {"following", "consistency"} | ({CONSECUTIVE} if rewards.pairing == "both" else set())
    for name in gate.auxiliary:
        if name in trained:
            yield f"gate.auxiliary: expected rewards that are not trained, got {name!r}, which is"
        elif rewards.scorer is None and name not in served:
            yield (
                f"gate.auxiliary: expected names among {sorted(served)}, or a scorer that gives "
                f"others, got {name!r}"
            )
    if len(set(gate.auxiliary)) < len(gate.auxiliary):
        yield f"gate.auxiliary: expected each name once, got {list(gate.auxiliary)}"


def _unsound_reset(config: Config) -> Iterator[str]:
    """Yield a message for each option that resets of the reference do not go with."""
    training = config.training
    if training.reset_steps is None:
        return
    if getattr(config.objective, "kl_coef", 0) == 0:
        yield (
            "training.reset_steps: expected None where objective.kl_coef is 0, which needs no "
            f"reference, got {training.reset_steps}"
        )
    if training.kl_target is not None:
        yield (
            "training.kl_target: expected None beside training.reset_steps, after which the KL "
            f"begins again at 0, got {training.kl_target}"
        )


def _unserved(rewards: Rewards, auxiliary: Sequence[str] = ()) -> Iterator[str]:
    """Yield a message for each missing service."""
    if rewards.scorer is None and not (rewards.judge and rewards.judge_model):
        yield "rewards: expected judge and judge_model, or a scorer"
    wanted = rewards.weights.get("consistency") or rewards.floor is not None
    if rewards.scorer is None and not rewards.consistency and wanted:
        yield "rewards.consistency: expected the URL of a server, or weight 0 and no floor for it"
    named = [name for name in auxiliary if name in ("consistency", CONSECUTIVE)]
    if rewards.scorer is None and not rewards.consistency and named and not wanted:
        yield f"rewards.consistency: expected the URL of a server for gate.auxiliary, {named[0]}"


def _ignored(config: Config, base: Config) -> Iterator[str]:
    """Yield a message for each changed field that nothing reads.

    ``unread`` maps a field to whether it is read, and the condition in words.
    """
    rewards, safety = config.rewards, config.safety
    reads_judge = rewards.scorer is None
    learns = config.objective.card.rewarded
    reads_reference = not learns or getattr(config.objective, "kl_coef", 0) > 0
    identity, growth = learns and config.data.identity_share > 0, config.growth
    unread = {
        ("data", "identity_share"): (
            learns and config.data.turns > 1,
            "the objective learns from rewards, and data.turns is above 1",
        ),
        ("data", "extra_groups"): (learns, "the objective learns from rewards"),
        ("data", "identity_instruction"): (
            identity or config.drifts,
            "data.identity_share is above 0, or the objective is mt_opsd",
        ),
        ("data", "drift"): (config.drifts, "the objective is mt_opsd"),
        ("growth", "every"): (growth.first is not None, "growth.first is given"),
        ("growth", "change"): (growth.first is not None, "growth.first is given"),
        ("growth", "patience"): (
            growth.first is not None and growth.change is not None,
            "growth.first and growth.change are given",
        ),
        ("model", "lora_start"): (config.model.lora is not None, "model.lora is given"),
        ("model", "lora_reference"): (
            config.model.lora is not None and reads_reference,
            "model.lora is given and objective.kl_coef, or distillation, uses a reference",
        ),
        ("sampling", "guidance"): (
            config.sampling.few_steps is not None,
            "sampling.model or sampling.lora is given",
        ),
        ("data", "allow_overlap"): (config.data.held_out is not None, "data.held_out is given"),
        ("data", "history"): (config.data.turns > 1, "data.turns is above 1"),
        ("model", "kept_blocks"): (config.model.checkpointing, "model.checkpointing is on"),
        ("data", "bucket_multiple"): (config.data.fit == "buckets", "data.fit is buckets"),
        ("rewards", "discount"): (rewards.credit == "to_go", "rewards.credit is to_go"),
        ("rewards", "trajectory_share"): (rewards.credit == "mixture", "rewards.credit is mixture"),
        ("rewards", "region_normalization"): (rewards.regions, "rewards.regions is on"),
        ("rewards", "region_outside"): (rewards.regions, "rewards.regions is on"),
        ("rewards", "floor_rate"): (rewards.floor is not None, "rewards.floor is given"),
        ("rewards", "floor_maximum"): (rewards.floor is not None, "rewards.floor is given"),
        ("safety", "ratio"): (config.stochastic, "the objective replays steps"),
        ("safety", "ratio_share"): (config.stochastic, "the objective replays steps"),
        ("gate", "auxiliary"): (learns, "the objective learns from rewards"),
        ("training", "reset_kl"): (
            config.training.reset_steps is not None,
            "training.reset_steps is given",
        ),
        ("training", "final_rate"): (
            config.training.schedule != "constant",
            "training.schedule is not constant",
        ),
        ("training", "ema_every"): (config.training.ema_decay > 0, "training.ema_decay > 0"),
        ("safety", "collapse_window"): (
            safety.collapse_drop < 1,
            "safety.collapse_drop is below 1",
        ),
    }
    for name in ("judge_model", "scope", "thinking", "answer_format", "answer_tokens",
                 "reasoning_tokens", "chat_template_kwargs", "extra_body", "concurrency",
                 "timeout"):  # fmt: skip
        unread["rewards", name] = (reads_judge, "there is no rewards.scorer")
    for name in ("share", "minimum", "maximum", "window"):
        unread["gate", name] = (bool(config.gate.auxiliary), "gate.auxiliary is given")
    unread["safety", "max_flat"] = (learns, "the objective learns from rewards")
    unread["safety", "drift_members"] = (learns, "the objective learns from rewards")
    for name in ("drift_rounds", "drift_width"):
        watched = learns and safety.drift_members > 0
        unread["safety", name] = (watched, "safety.drift_members is above 0")
    for name in ("terms", "pairing"):
        unread["rewards", name] = (bool(rewards.consistency), "rewards.consistency is given")
    for name in ("weights", "aggregate", "credit", "groups", "floor", "fusion", "std",
                 "advantage_limit", "history", "regions"):  # fmt: skip
        unread["rewards", name] = (learns, "the objective learns from rewards")
    if isinstance(config, DistillationConfig):
        gate, sessions = config.teacher.sessions is not None, "teacher.sessions is given"
        unread["teacher", "path"] = (not config.drifts, "the objective is distillation")
        unread["teacher", "sessions"] = (config.drifts, "the objective is mt_opsd")
        for name in ("every", "turns", "success_margin", "collapse_margin", "degraded"):
            unread["teacher", name] = (gate, sessions)
    for (section, name), (read, when) in unread.items():
        value = getattr(getattr(config, section), name)
        # A preset may set a field that another objective on the command line then ignores.
        if not read and value != getattr(getattr(base, section), name):
            yield f"{section}.{name}: has an effect only where {when}, got {value!r}"
