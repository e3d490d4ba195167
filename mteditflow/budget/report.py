"""Report of a budget as text and JSON: memory by phase, work, time, and how to make it fit."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from textwrap import wrap
from typing import Any

from mteditflow.budget.advice import Alternative, alternatives, spared
from mteditflow.budget.compute import GPUS, least_hours, work
from mteditflow.budget.plan import GIB, Plan, Verdict, peak, phases, usable, verdict


@dataclass(frozen=True)
class Budget:
    """Predicted cost of a run on GPUs of some size.

    Attributes:
        name: name of the run in the report, such as the preset's.
        plan: the run as it is configured.
        memory: memory of a GPU in GiB.
        efficiency: assumed share of a GPU's peak rate.
        options: options of the trainer that may be changed.
        cheaper: by option and value, F per trajectory under an option that changes the gradients.
    """

    name: str
    plan: Plan
    memory: float
    efficiency: float = 0.4
    options: Collection[str] = ()
    cheaper: Mapping[str, float] = field(default_factory=dict)

    @property
    def as_given(self) -> Verdict:
        """Return whether the run fits as it is configured."""
        return verdict(self.plan, self.memory)

    @property
    def alternatives(self) -> list[Alternative]:
        """Return runs with changed options, one for each precision of the weights."""
        return alternatives(self.plan, self.memory, options=self.options)

    @property
    def feasible(self) -> bool:
        """Return whether the run, or an alternative to it, fits or is tight."""
        return any(x.verdict != "no" for x in self.alternatives)

    def hours(self, rounds: int) -> dict[str, float]:
        """Return the least hours of this number of rounds, by known GPU."""
        return {
            name: least_hours(self.plan, rate, efficiency=self.efficiency, rounds=rounds)
            for name, rate in GPUS.items()
        }

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON values; memory in GiB, work in FLOPs, time in hours."""
        plan, cost = self.plan, work(self.plan)
        return {
            "predicted": True,
            "run": self.name,
            "gpus": plan.gpus,
            "memory": self.memory,
            "usable": _gib(usable(self.memory)),
            "verdict": self.as_given,
            "feasible": self.feasible,
            "phases": [
                {
                    "name": x.name,
                    "weights": _gib(x.weights),
                    "adapters": _gib(x.adapters),
                    "activations": _gib(x.activations),
                    "total": _gib(x.total),
                }
                for x in phases(plan)
            ],
            "alternatives": [
                {
                    "changes": x.changed,
                    "verdict": x.verdict,
                    "peak": _gib(peak(x.plan).total),
                    "phase": peak(x.plan).name,
                }
                for x in self.alternatives
            ],
            "flops": {
                "forward": cost.forward,
                "sampling_forward": cost.sampling_forward,
                "sampling": cost.sampling,
                "update": cost.update,
                "trajectory": cost.total,
                "round": cost.total * plan.trajectories,
                "forwards": cost.in_forwards,
            },
            "cheaper": {name: round(value, 2) for name, value in self.cheaper.items()},
            "efficiency": self.efficiency,
            "rounds": plan.rounds,
            "least_hours_per_100_rounds": {k: round(v, 2) for k, v in self.hours(100).items()},
            "least_hours": {k: round(v, 1) for k, v in self.hours(plan.rounds).items()},
        }

    def lines(self) -> list[str]:
        """Return the report in lines of at most 100 characters."""
        return [
            f"{self.name} on {_gpus(self.plan.gpus)} of {self.memory:g} GiB: {self.as_given} as "
            f"configured (predicted, {usable(self.memory) / GIB:.1f} GiB usable)",
            "",
            *self._memory_lines(),
            "",
            *self._advice_lines(),
            "",
            *self._work_lines(),
            *self._cheaper_lines(),
        ]

    def _memory_lines(self) -> list[str]:
        rows = [["GiB on each GPU", "weights", "adapters", "activations", "total"]]
        for x in phases(self.plan):
            sizes = (x.weights, x.adapters, x.activations, x.total)
            rows.append([self._phase_title(x.name), *(f"{n / GIB:.1f}" for n in sizes)])
        width = max(len(row[0]) for row in rows)
        return [f"{row[0]:<{width}}" + "".join(f"{x:>13}" for x in row[1:]) for row in rows]

    def _phase_title(self, name: str) -> str:
        plan = self.plan
        batch = {
            "update": plan.training_batch,
            "sampling": 1 if plan.one_by_one else plan.sampling_batch,
            "evaluation": 1 if plan.one_by_one else plan.evaluation_batch,
        }
        return f"{name}, batch {batch[name]}" if name in batch else name

    def _advice_lines(self) -> list[str]:
        found: list[str] = []
        for x in sorted(self.alternatives, key=lambda x: x.verdict == "no"):
            options = ", ".join(f"{name} {value}" for name, value in x.changed.items())
            found += self._alternative(x.verdict, x.plan, options or "as configured")
        if self.as_given == "no" and self.feasible:
            head = "It fits only with changes:"
        elif not self.feasible:
            head = "Nothing fits; the smallest that the options allow:"
        else:
            head = "Options:"
        faster = spared(self.plan, self.memory)
        if faster is not None:
            saved = work(self.plan).in_forwards - work(faster).in_forwards
            option = (
                f"model.kept_blocks {faster.kept_blocks} of {faster.blocks}"
                if faster.checkpointing
                else "model.checkpointing false"
            )
            words = f"{option}, which saves {saved:.1f} F a trajectory"
            found += self._alternative("fits", faster, words)
        return [head, *found]

    def _alternative(self, found: Verdict, plan: Plan, words: str) -> list[str]:
        highest = peak(plan)
        line = f"  {found:<5} {highest.total / GIB:5.1f} GiB ({highest.name}): {words}"
        return wrap(line, 100, subsequent_indent=" " * 8, break_on_hyphens=False)

    def _work_lines(self) -> list[str]:
        plan, cost = self.plan, work(self.plan)
        unit = cost.forward
        sampler = "" if plan.sampler is None else f"; sampling's {cost.sampling_forward / 1e12:.3g}"
        spans = dict.fromkeys((100, plan.rounds))  # 100 compares runs of different lengths
        return [
            f"F, a forward pass of a row in one branch: {unit / 1e12:.3g} TFLOP{sampler}",
            f"trajectory: {cost.in_forwards:.1f} F, {cost.sampling / unit:.1f} of sampling and "
            f"{cost.update / unit:.1f} of the update; {cost.total / 1e12:.4g} TFLOP",
            f"round of {plan.trajectories} trajectories: "
            f"{cost.total * plan.trajectories / 1e15:.3g} PFLOP",
            f"least hours at {self.efficiency:.0%} of peak, {_gpus(plan.gpus)}, without "
            "evaluations and the judge:",
            *(f"  {rounds} rounds: {self._hours_line(rounds)}" for rounds in spans),
        ]

    def _hours_line(self, rounds: int) -> str:
        return ", ".join(f"{name} {value:.3g}" for name, value in self.hours(rounds).items())

    def _cheaper_lines(self) -> list[str]:
        if not self.cheaper:
            return []
        given = work(self.plan).in_forwards
        shown = [f"{name}: {x:.1f} F ({x / given - 1:+.0%})" for name, x in self.cheaper.items()]
        return ["", "less work, with other gradients:", *(f"  {line}" for line in shown)]


def _gib(count: float) -> float:
    return round(count / GIB, 2)


def _gpus(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count} GPUs"
