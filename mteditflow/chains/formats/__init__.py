"""The formats that chains are kept in, each as users already hold it."""

from mteditflow.chains.formats.base import Format, Row
from mteditflow.chains.formats.edival import EDIVAL
from mteditflow.chains.formats.imgedit import IMGEDIT
from mteditflow.chains.formats.lines import EDIT_R2, FLOW_GRPO, NATIVE, PICO_BANANA

#: Every format by name. In this order a line of JSON is recognized: what several could read is of
#: the first.
FORMATS: dict[str, Format] = {
    known.name: known for known in (NATIVE, EDIVAL, EDIT_R2, PICO_BANANA, FLOW_GRPO, IMGEDIT)
}

__all__ = ["FORMATS", "Format", "Row"]
