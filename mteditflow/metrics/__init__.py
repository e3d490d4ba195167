"""Metrics of multi-turn editing: shares of chains by turn, long chains, intervals over chains."""

from mteditflow.metrics.intervals import FEW_CASES as FEW_CASES
from mteditflow.metrics.intervals import Interval as Interval
from mteditflow.metrics.intervals import bootstrap_interval as bootstrap_interval
from mteditflow.metrics.intervals import interval_difference as interval_difference
from mteditflow.metrics.intervals import paired_difference_interval as paired_difference_interval
from mteditflow.metrics.intervals import wilson_interval as wilson_interval
from mteditflow.metrics.long_chains import collapse_rate as collapse_rate
from mteditflow.metrics.long_chains import wear as wear
from mteditflow.metrics.shares import conditional_success as conditional_success
from mteditflow.metrics.shares import content_consistency as content_consistency
from mteditflow.metrics.shares import instruction_following as instruction_following
from mteditflow.metrics.shares import marginal_success as marginal_success
from mteditflow.metrics.shares import overall as overall
from mteditflow.metrics.survival import TurnsSurvived as TurnsSurvived
from mteditflow.metrics.survival import survival_curve as survival_curve
from mteditflow.metrics.survival import turns_survived as turns_survived
