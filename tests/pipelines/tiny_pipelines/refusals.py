"""Families that the recorder refuses, as cases of refusal."""

from __future__ import annotations

from .base import Family, Refused


def refused(family: Family, reason: str, kind: str | None = None) -> Refused:
    """A family's first turn, of one trajectory, that must be refused.

    Args:
        family: what is built and called.
        reason: a part of the error.
        kind: of guidance; None is the family's first.
    """
    guidance = family.guided[kind or next(iter(family.guided))]
    options = family.inputs(0, 1) | family.options | guidance
    return Refused(family.build, options, reason, family.steps, family.model)
