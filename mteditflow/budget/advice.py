"""Changes of options that make a run fit on a GPU, one at a time, for the peak phase first."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

from mteditflow.budget.plan import Phase, Plan, Quantize, Verdict, peak, phases, verdict


@dataclass(frozen=True)
class Change:
    """Option of the trainer that lowers the memory of a phase.

    Attributes:
        option: name of the option in the trainer.
        apply: returns the plan with the option's next value; None if there is none.
        shown: returns the option's value in a plan, as it is written on the command line.
        phases: prefixes of the names of the phases that it lowers; "" for all.
    """

    option: str
    apply: Callable[[Plan], Plan | None]
    shown: Callable[[Plan], str]
    phases: tuple[str, ...]


def _halved(field: str) -> Callable[[Plan], Plan | None]:
    def halve(plan: Plan) -> Plan | None:
        value = getattr(plan, field)
        return None if value == 1 else replace(plan, **{field: value // 2})

    return halve


def _set(field: str, value: Any) -> Callable[[Plan], Plan | None]:
    def change(plan: Plan) -> Plan | None:
        return None if getattr(plan, field) == value else replace(plan, **{field: value})

    return change


def _value(field: str) -> Callable[[Plan], str]:
    return lambda plan: str(getattr(plan, field))


def _ahead(plan: Plan) -> Plan | None:
    free = plan.encoders == "device" and not plan.reads_images
    return replace(plan, encoders="ahead") if free else None


def _sharded(plan: Plan) -> Plan | None:
    """Shard a plan that allows it: without packed weights, 8-bit optimizer or few-step sampler."""
    plain = (plan.shard, plan.quantize, plan.optimizer_bytes) == ("none", "none", 8)
    alone = plain and plan.sampler is None
    return replace(plan, shard="fsdp2") if alone and plan.gpus > 1 else None


def _lean_optimizer(plan: Plan) -> Plan | None:
    fits = plan.optimizer_bytes == 8 and plan.shard != "fsdp2"
    return replace(plan, optimizer_bytes=2) if fits else None


def _sampling(name: str, field: str) -> Change:
    return Change(f"{name}.batch", _halved(field), _value(field), (name,))


QUANTIZE = "model.quantize"
#: Options in the order in which they are tried for a phase; quantization is tried separately.
CHANGES = (
    Change(
        "model.prompt_folder",
        _ahead,
        lambda plan: "DIR" if plan.encoders == "ahead" else "none",
        ("text encoders",),
    ),
    Change(
        "model.encoders",
        _set("encoders", "host"),
        lambda plan: "host" if plan.encoders == "host" else "device",
        ("text encoders",),
    ),
    Change(
        "model.vae_slicing",
        _set("vae_slicing", True),
        lambda plan: str(plan.vae_slicing).lower(),
        ("sampling, VAE", "evaluation, VAE"),
    ),
    Change(
        "model.checkpointing",
        _set("checkpointing", True),
        lambda plan: str(plan.checkpointing).lower(),
        ("update",),
    ),
    Change("training.batch", _halved("training_batch"), _value("training_batch"), ("update",)),
    _sampling("sampling", "sampling_batch"),
    _sampling("evaluation", "evaluation_batch"),
    Change("model.shard", _sharded, _value("shard"), ("",)),
    Change(
        "training.optimizer",
        _lean_optimizer,
        lambda plan: "adamw_8bit" if plan.optimizer_bytes == 2 else "adamw",
        ("",),
    ),
)


@dataclass(frozen=True)
class Alternative:
    """Run with some options changed.

    Attributes:
        changed: new values by option; empty for the run as it is configured.
        plan: the changed run.
        verdict: whether the changed run fits.
    """

    changed: dict[str, str]
    plan: Plan
    verdict: Verdict


def alternatives(plan: Plan, memory: float, *, options: Collection[str]) -> list[Alternative]:
    """Return, for each precision of the weights, the run with the fewest changes that fits best.

    Args:
        plan: the run as it is configured.
        memory: memory of a GPU in GiB.
        options: options of the trainer that may change; other changes are not considered.

    Returns:
        One alternative for each value of ``model.quantize``, the configured one first. If none of
        its changes fits, it is the smallest run that the options allow, with the verdict "no".
    """
    values: list[Quantize] = [plan.quantize]
    if QUANTIZE in options and plan.shard == "none":
        values += [x for x in ("none", "int8", "nf4") if x != plan.quantize]
    return [_best(plan, replace(plan, quantize=x), memory, options) for x in values]


def _best(asked: Plan, start: Plan, memory: float, options: Collection[str]) -> Alternative:
    """Return the first of ever smaller runs that fits, else the first tight one, or the last."""
    tried = [(verdict(plan, memory), plan) for plan in _smaller(start, options)]
    for wanted in ("fits", "tight"):
        for found, plan in tried:
            if found == wanted:
                return Alternative(_changed(asked, plan), plan, found)
    return Alternative(_changed(asked, tried[-1][1]), tried[-1][1], "no")


def _smaller(plan: Plan, options: Collection[str]) -> Iterator[Plan]:
    """Yield a run, then the run with one change after another, each for the peak phase."""
    while True:
        yield plan
        highest = peak(plan)
        for change in CHANGES:
            if change.option in options and highest.name.startswith(change.phases):
                changed = change.apply(plan)
                if changed is not None and _lowers(changed, highest):
                    plan = changed
                    break
        else:  # no change lowers the peak any further
            return


def _lowers(plan: Plan, phase: Phase) -> bool:
    return next(x for x in phases(plan) if x.name == phase.name).total < phase.total


def _changed(asked: Plan, plan: Plan) -> dict[str, str]:
    """Return the options in which two runs differ, with the values of the second."""
    precision = {} if plan.quantize == asked.quantize else {QUANTIZE: plan.quantize}
    pairs = {x.option: (x.shown(asked), x.shown(plan)) for x in CHANGES}
    return {**precision, **{name: new for name, (old, new) in pairs.items() if old != new}}


def spared(plan: Plan, memory: float) -> Plan | None:
    """Return the run that recomputes the fewest blocks and still fits; None if there is none.

    Args:
        plan: the run.
        memory: memory of a GPU in GiB.
    """
    if not plan.checkpointing:
        return None
    whole = replace(plan, checkpointing=False, kept_blocks=0)
    fewer = range(plan.blocks - 1, plan.kept_blocks, -1)
    for found in (whole, *(replace(plan, kept_blocks=kept) for kept in fewer)):
        if verdict(found, memory) == "fits":
            return found
    return None
