"""File formats of chains: the native one and those of public data sets and benchmarks."""

from mteditflow.chains.formats.base import Format, Row
from mteditflow.chains.formats.edival import EDIVAL
from mteditflow.chains.formats.imgedit import IMGEDIT, IMGEDIT_MULTI_TURN
from mteditflow.chains.formats.lines import (
    EDIT_R2,
    FLOW_GRPO,
    NATIVE,
    PICO_BANANA,
    SEED_DATA_EDIT,
)
from mteditflow.chains.formats.magicbrush import MAGICBRUSH
from mteditflow.chains.formats.sessions import LME, MSE

#: Every format by name. Recognition tries them in this order; the first match wins.
FORMATS: dict[str, Format] = {
    known.name: known
    for known in (
        *(NATIVE, EDIVAL, EDIT_R2, PICO_BANANA, FLOW_GRPO, SEED_DATA_EDIT),
        *(MSE, IMGEDIT, IMGEDIT_MULTI_TURN, MAGICBRUSH, LME),
    )
}

__all__ = ["FORMATS", "Format", "Row"]
