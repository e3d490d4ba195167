"""Results of all runs by setting and seed, and of each claim."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

import torch
from torch import Tensor

from mteditflow import overall
from mteditflow.evaluation import Evaluation
from mteditflow.evaluation.seeds import (
    SeedInterval,
    difference_interval,
    mean_interval,
    percentile_ends,
    resampled_means,
    setting_errors,
)
from mteditflow.training.metrics_file import SECONDS

from .running import Ablations, Run
from .study import EIGHT, UNTRAINED, Claim, Finding, Setting, Study

TITLES = {
    "overall": "Overall(3)",
    "instruction_following": "IF(3)",
    "marginal": "Marginal(3)",
    "content_consistency": "CC(3)",
    "strict": "whole picture right",
}
RATIO = "group/variance_ratio/following/consistency"


@dataclass(frozen=True)
class Results:
    """Results of all settings of a study, for all complete seeds.

    Attributes:
        study: The study.
        runs: Runs by name of the setting, one per seed; with the untrained one if it is compared.
        long: The base run on longer chains, one per seed; empty if the study has none.
    """

    study: Study
    runs: Mapping[str, Sequence[Run]]
    long: Sequence[Run]

    @classmethod
    def read(cls, ablations: Ablations) -> Results:
        """Read the results of all complete seeds.

        Raises:
            ValueError: No seed is complete.
        """
        seeds = ablations.complete_seeds()
        if not seeds:
            raise ValueError(f"{ablations.folder}: expected a seed with all settings, got none")
        study = ablations.study
        runs = {n: [ablations.result(s, k) for k in seeds] for n, s in study.settings.items()}
        if any(UNTRAINED in finding.settings for finding in study.findings):
            runs[UNTRAINED.name] = [Run(r.before, r.before, ()) for r in runs[study.base.name]]
        longer = seeds if study.longer is not None else []
        return cls(study, runs, [ablations.result(study.base, k, EIGHT) for k in longer])

    @cached_property
    def tables(self) -> dict[str, Tensor]:
        """Each metric at the last turn after training, in percent, ``[settings, seeds]``."""
        return {name: self._table(name, "after") for name in TITLES}

    @cached_property
    def _resampled(self) -> dict[str, Tensor]:
        """Each metric over resampled chains, mean over seeds, ``[resamples, settings]``."""
        tables: dict[str, list[Tensor]] = {}
        for seed in range(len(self.runs[self.study.base.name])):
            values = [chain_values(own[seed].after) for own in self.runs.values()]
            means = resampled_means(values, seed=seed)
            # Overall is not linear, so it comes from each resample's IF and CC.
            means["overall"] = overall(means["instruction_following"], means["content_consistency"])
            for name, mean in means.items():
                tables.setdefault(name, []).append(mean)
        return {name: torch.stack(own).mean(dim=0) for name, own in tables.items()}

    def _table(self, metric: str, when: str) -> Tensor:
        rows = [[at_last(getattr(r, when), metric) for r in own] for own in self.runs.values()]
        return torch.tensor(rows, dtype=torch.float64)

    def values(self, setting: Setting, metric: str) -> Tensor:
        """Return a metric of one setting by seed, ``[seeds]``."""
        return self.tables[metric][self._row(setting)]

    def before(self, setting: Setting, metric: str) -> float:
        """Return the untrained model's mean at the steps of a setting."""
        return fmean(at_last(run.before, metric) for run in self.runs[setting.name])

    def difference(self, first: Setting, second: Setting, metric: str = "overall") -> SeedInterval:
        """Return the difference of two settings after training, paired by seed."""
        return difference_interval(self.tables[metric], self._row(first), self._row(second))

    def claim(self, finding: Finding, claim: Claim) -> SeedInterval:
        """Return the difference of a claim, with its t-interval over seeds."""
        return self.difference(*_compared(finding, claim), claim.metric)

    def over_chains(self, finding: Finding, claim: Claim) -> tuple[float, float]:
        """Return the bootstrap interval of the same difference over the chains of these seeds."""
        table = self._resampled[claim.metric]
        higher, lower = (table[:, self._row(x)] for x in _compared(finding, claim))
        return percentile_ends(higher - lower)

    def seconds(self, setting: Setting) -> float:
        """Return seconds of a round, mean over rounds and seeds."""
        return self._seconds(setting.name)

    def _seconds(self, name: str) -> float:
        rounds = [line for run in self.runs[name] for line in run.metrics]
        sums = [sum(x for k, x in line.items() if k.startswith(SECONDS)) for line in rounds]
        return fmean(sums) if sums else 0.0

    @property
    def chains(self) -> int:
        """Return the number of held-out chains of each seed."""
        return len(self.runs[self.study.base.name][0].after)

    @property
    def error_range(self) -> tuple[float, float]:
        """Return the smallest and largest error of Overall(3) of single settings, in points."""
        errors = setting_errors(self.tables["overall"])
        return float(errors.min()), float(errors.max())

    @property
    def minutes(self) -> float:
        """Return minutes of training, all runs together."""
        return sum(
            self._seconds(name) * sum(len(run.metrics) for run in own) / 60
            for name, own in self.runs.items()
        )

    @property
    def variance_ratio(self) -> float:
        """Return Var(IF) / Var(CC) inside groups, median over the rounds of the base runs."""
        found = [
            line.get(RATIO, torch.nan)
            for r in self.runs[self.study.base.name]
            for line in r.metrics
        ]
        return float(torch.tensor(found).nanmedian())

    def _row(self, setting: Setting) -> int:
        return list(self.runs).index(setting.name)


def _compared(finding: Finding, claim: Claim) -> tuple[Setting, Setting]:
    """Return the settings that a claim expects to be higher and lower."""
    by_label = {setting.label: setting for setting in finding.settings}
    return by_label[claim.higher], by_label[claim.lower]


def with_range(values: Tensor, spec: str = ".1f") -> str:
    """Format the mean over seeds with the lowest and highest seed, if their values differ.

    A t-interval of two or three shares leaves the range of a share, and resampling three seeds
    does not show the tails, so levels have no interval; only differences do.

    Args:
        values: values of one setting, one per seed, [S].
        spec: format of a number.
    """
    mean, *ends = (format(float(x), spec) for x in (values.mean(), values.min(), values.max()))
    return mean if ends[0] == ends[1] else f"{mean} ({', '.join(ends)})"


def chain_values(evaluation: Evaluation) -> dict[str, Tensor]:
    """Return per-chain terms whose means are the metrics at the last turn, percent, ``[B]``."""
    last = {name: scores.score[:, -1].double() for name, scores in evaluation.terms.items()}
    return {
        "instruction_following": 100 * evaluation.success.all(dim=1).double(),
        "marginal": 100 * evaluation.success[:, -1].double(),
        "content_consistency": 100 * last["consistency"],
        "strict": 100 * last["strict"],
    }


def at_last(evaluation: Evaluation, metric: str) -> float:
    """Return a metric at the last turn, in percent."""
    value = evaluation.estimates[metric][-1]
    return 100 * value if metric == "strict" else value


def long_claims(long: Sequence[Run]) -> dict[str, SeedInterval]:
    """Return changes on longer chains, after minus before, with t-intervals over seeds."""
    marginal = torch.tensor(
        [[e.estimates["marginal"] for e in (run.before, run.after)] for run in long],
        dtype=torch.float64,
    )  # [seeds, 2, turns]
    first, third, last = marginal[..., 0], marginal[..., 2], marginal[..., -1]
    measures = {
        "Marginal(8)": last,
        "Marginal(8) / Marginal(1), percent": 100 * last / first,
        "Marginal(3) / Marginal(1), percent": 100 * third / first,
        "no fall, Marginal(8) - Marginal(1)": last - first,
        "no fall, Marginal(3) - Marginal(1)": third - first,
    }
    return {name: mean_interval(x[:, 1] - x[:, 0]) for name, x in measures.items()}
