"""Laws by kind of function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mteditflow.testing.advantage import ADVANTAGE
from mteditflow.testing.densities import KL, LOG_PROB
from mteditflow.testing.fusion import FUSION
from mteditflow.testing.law import Laws
from mteditflow.testing.losses import LOSS
from mteditflow.testing.models import AVERAGE
from mteditflow.testing.policy_losses import NFT_LOSS, POLICY_LOSS
from mteditflow.testing.selection import SELECTION
from mteditflow.testing.solvers import SOLVER
from mteditflow.testing.turns import AGGREGATOR, CREDIT

_ALL: tuple[Laws[Any], ...] = (
    ADVANTAGE, FUSION, SELECTION, AGGREGATOR, CREDIT, POLICY_LOSS, NFT_LOSS, LOSS,
    SOLVER, LOG_PROB, KL, AVERAGE,
)  # fmt: skip
#: Laws by name of the kind.
KINDS: Mapping[str, Laws[Any]] = {laws.kind: laws for laws in _ALL}


def laws_of(kind: str) -> Laws[Any]:
    """Return the laws of a kind.

    Args:
        kind: a name in ``KINDS``.

    Raises:
        ValueError: there is no such kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    return KINDS[kind]
