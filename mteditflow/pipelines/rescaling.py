"""Rescalings: pipelines that change the length of a guided velocity, never its direction."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Rescaling(Protocol):
    """Changes the length of a combined velocity [B, ...], in groups of its elements."""

    def __call__(self, combined: Tensor, positive: Tensor) -> Tensor:
        """Rescale; ``positive`` is the velocity of the positive branch."""


@dataclass(frozen=True)
class TokenNorm:
    """Every token as long as the positive branch's: Qwen-Image."""

    def __call__(self, combined: Tensor, positive: Tensor) -> Tensor:
        """See ``Rescaling``."""
        return combined * (_token_norms(positive) / _token_norms(combined))


@dataclass(frozen=True)
class NormLimit:
    """No sample longer than ``limit`` times the positive branch's: Z-Image's normalization."""

    limit: float

    def __call__(self, combined: Tensor, positive: Tensor) -> Tensor:
        """See ``Rescaling``."""
        longest, norm = self.limit * _norms(positive), _norms(combined)
        return torch.where(norm > longest, combined * (longest / norm), combined)


@dataclass(frozen=True)
class StdMix:
    """A share ``mix`` of it with the positive branch's standard deviation: LTX-Video.

    Source: arXiv 2305.08891, section 3.4.
    """

    mix: float

    def __call__(self, combined: Tensor, positive: Tensor) -> Tensor:
        """See ``Rescaling``."""
        axes = list(range(1, combined.ndim))
        wanted, std = (x.std(dim=axes, keepdim=True) for x in (positive, combined))
        return self.mix * (combined * (wanted / std)) + (1 - self.mix) * combined


def rescalings(combined: Tensor, positive: Tensor, velocity: Tensor) -> Iterator[Rescaling]:
    """Rescalings that might make the velocity, with settings of few decimals, as people give."""
    yield TokenNorm()
    yield from map(NormLimit, rounded(norm_ratio(velocity, positive).item(), 4))
    mixed = StdMix(1.0)(combined, positive) - combined
    yield from map(StdMix, rounded(share(velocity - combined, mixed), 4))


def share(x: Tensor, of: Tensor) -> float:
    """The factor of ``of`` that comes nearest to ``x``."""
    return ((x * of).sum() / of.square().sum()).item()


def rounded(x: float, digits: int) -> list[float]:
    """A number to none, one, two ... decimals."""
    return [round(x, decimals) for decimals in range(digits + 1)]


def norm_ratio(x: Tensor, to: Tensor) -> Tensor:
    """The largest ratio between the norms of two rows, a 0-d tensor."""
    return (_norms(x) / _norms(to)).max()


def _norms(x: Tensor) -> Tensor:
    """Norm of each row [B, ...], with as many axes; row by row, for the bits of Z-Image."""
    norms = torch.stack([torch.linalg.vector_norm(row) for row in x])
    return norms.reshape(-1, *[1] * (x.ndim - 1))


def _token_norms(x: Tensor) -> Tensor:
    """Norm along the last axis, which stays."""
    norms: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norms
