r"""Shares of chains that succeed, turn by turn, with content consistency and Overall.

Shapes: ``C`` chains (one image each), ``N`` turns. All metrics are shares in [0, 1] per turn, [N];
multiply by 100 for percent. Mask turns without a score by ``valid``; they leave the denominator.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mteditflow._checks import (
    Numbers,
    as_mask,
    as_real,
    check_floating,
    check_rank,
    check_same_shape,
    check_values,
    first_tensor,
)
from mteditflow._reduce import mean_where, promote


def instruction_following(success: Numbers, *, valid: Numbers | None = None) -> Tensor:
    """IF(t), also called SR@t: share of chains whose turns 1..t ALL succeeded.

    LME-Bench, MSE-Bench and other long-chain benchmarks report it as SR@k at some turns k.

    Args:
        success: 0 or 1 per turn, [C, N]; boolean, integer or floating point.
        valid: boolean, [C, N]; a chain leaves the denominator from its first invalid turn on, even
            if it failed before, because keeping only the failures would bias the share down.

    Returns:
        [N], float32 (float64 if given, as lists of floats are), non-increasing where all turns are
        valid; NaN for a turn without valid chains.

    Raises:
        ValueError: wrong shape, or a value other than 0 and 1.
        TypeError: ``valid`` is not boolean.

    Source: EdiVal-Bench (arXiv 2509.13399), as used by MT-EditFlow (arXiv 2606.01985).

    Example:
        >>> instruction_following(torch.tensor([[1, 0, 1], [1, 1, 1]]))
        tensor([1.0000, 0.5000, 0.5000])
    """
    score, mask = success_and_mask("success", success, valid)
    # Products over turns are logical ANDs: all turns so far succeeded, and all are valid.
    return mean_over_chains(score.cumprod(dim=1), mask.long().cumprod(dim=1).bool())


def marginal_success(success: Numbers, *, valid: Numbers | None = None) -> Tensor:
    """Marginal(t): share of chains whose turn t succeeded, regardless of earlier turns.

    Its fall from turn 1 to N is the exposure-bias drop. The ratio Marginal(N) / Marginal(1) is not
    the share of turn-1 successes that succeed at turn N: that is ``conditional_success``.

    Args:
        success: 0 or 1 per turn, [C, N]; boolean, integer or floating point.
        valid: boolean, [C, N]; an invalid turn leaves the denominator.

    Returns:
        [N], float32 (float64 if given, as lists of floats are); NaN for a turn without valid
        chains.

    Raises:
        ValueError: wrong shape, or a value other than 0 and 1.
        TypeError: ``valid`` is not boolean.

    Source: EdiVal-Bench (arXiv 2509.13399), as used by MT-EditFlow (arXiv 2606.01985).

    Example:
        >>> marginal_success(torch.tensor([[1, 0, 1], [1, 1, 1]]))
        tensor([1.0000, 0.5000, 1.0000])
    """
    return mean_over_chains(*success_and_mask("success", success, valid))


def conditional_success(success: Numbers, *, valid: Numbers | None = None) -> Tensor:
    """P(success at t | success at 1): success at turn t among chains that succeeded at turn 1.

    Chains that failed at turn 1 are excluded. They do enter Marginal(t) / Marginal(1), which their
    later successes raise.

    Args:
        success: 0 or 1 per turn, [C, N]; boolean, integer or floating point.
        valid: boolean, [C, N]; a chain whose turn 1 or turn t is invalid leaves the denominator.

    Returns:
        [N] in [0, 1], float32 (float64 if given, as lists of floats are), 1 at turn 1; NaN for a
        turn without such chains. If no chain succeeded at turn 1, all turns are NaN.

    Raises:
        ValueError: wrong shape, or a value other than 0 and 1.
        TypeError: ``valid`` is not boolean.

    Example:
        >>> success = torch.tensor([[1, 0], [0, 1], [0, 1]])
        >>> conditional_success(success)
        tensor([1., 0.])
        >>> first, last = marginal_success(success)
        >>> last / first
        tensor(2.)
    """
    score, mask = success_and_mask("success", success, valid)
    first = score[:, :1]  # a NaN, where values cannot be checked, stays one in the mean
    return mean_over_chains(score * first, mask & mask[:, :1] & (first != 0))


def content_consistency(*terms: Numbers) -> Tensor:
    """CC(t), corpus average: the mean over terms of each term's mean over chains.

    Pass a single term for one score per sample, or an object and a background term. The per-sample
    average (mean over chains of the mean of a chain's terms) differs if any term is missing.

    Args:
        *terms: each [C, N]; NaN where a chain has no such term at that turn. Integers count as
            float32.

    Returns:
        [N], float32 (float64 if given, as lists of floats are). A term that no chain has at a turn
        is left out there; NaN if no term is left.

    Raises:
        ValueError: there is no term, or shapes differ.
        TypeError: a term is not real.

    Source: EdiVal-Bench (arXiv 2509.13399), as used by MT-EditFlow (arXiv 2606.01985).

    Example:
        >>> content_consistency(torch.tensor([[0.8], [0.6]]), torch.tensor([[1.0], [torch.nan]]))
        tensor([0.8500])
    """
    if not terms:
        raise ValueError("terms: expected at least one tensor, got none")
    like = first_tensor(*terms)
    named = {f"terms[{i}]": as_real(f"terms[{i}]", x, like=like) for i, x in enumerate(terms)}
    check_floating(**named)
    check_same_shape(**named)
    for name, term in named.items():
        check_rank(name, term, 2, "[C, N]", maximum=2)
    terms_of_one_dtype = promote(*named.values())
    means = torch.stack([_nanmean(term) for term in terms_of_one_dtype])
    return _nanmean(means).to(terms_of_one_dtype[0].dtype)


def overall(following: Numbers, consistency: Numbers) -> Tensor:
    r"""Overall(t), the geometric mean :math:`\sqrt{IF(t)\,CC(t)}`.

    Args:
        following: IF, any shape, >= 0.
        consistency: CC, same shape and unit. Negative values, possible for cosines, count as 0.

    Returns:
        Same shape and unit (shares give a share, percent give percent), float32 (float64 if given,
        as lists of floats are).

    Raises:
        ValueError: shapes differ, or IF is negative.
        TypeError: an argument is not real.

    Source: EdiVal-Bench (arXiv 2509.13399), as used by MT-EditFlow (arXiv 2606.01985).

    Example:
        >>> overall(torch.tensor([59.97]), torch.tensor([95.32]))
        tensor([75.6065])
    """
    like = first_tensor(following, consistency)
    following = as_real("following", following, like=like)
    consistency = as_real("consistency", consistency, like=following if like is None else like)
    check_floating(following=following, consistency=consistency)
    check_same_shape(following=following, consistency=consistency)
    following, consistency = promote(following, consistency)
    check_values("following", following, ~(following < 0), "values >= 0")
    # Two roots: the product may overflow or underflow where its root does not.
    return following.sqrt() * consistency.clamp(min=0).sqrt()


def success_and_mask(name: str, success: Numbers, valid: Numbers | None) -> tuple[Tensor, Tensor]:
    """Check per-turn flags; return them as numbers with the mask of valid turns."""
    (score,) = promote(as_real(name, success))
    check_floating(**{name: score})
    check_rank(name, score, 2, "[C, N]", maximum=2)
    mask = as_mask("valid", valid, score, "[C, N]")
    check_values(name, score, ~mask | (score == 0) | (score == 1), "0 or 1")
    return score, mask


def _nanmean(x: Tensor) -> Tensor:
    """Mean along the first axis without NaN; NaN where there is no other number."""
    number = ~x.isnan()
    return torch.where(number.any(dim=0), mean_where(x, number, dim=0), torch.nan)


def mean_over_chains(score: Tensor, mask: Tensor) -> Tensor:
    """Mean over chains of the entries in the mask; NaN (0 / 0) if there are none."""
    return torch.where(mask, score, 0).sum(dim=0) / mask.sum(dim=0)
