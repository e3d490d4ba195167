"""Gathering of scores over ranks into one batch, so that a group may span several ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mteditflow.distributed import gather_ranks
from mteditflow.evaluation.records import TermRecord
from mteditflow.rewards import TurnScores


def gather_scores(
    terms: Mapping[str, TurnScores], *, device: torch.device | str = "cpu"
) -> tuple[dict[str, TurnScores], slice]:
    """Concatenate each term over ranks along the batch, with the reasons of lost scores.

    This is a collective call where ``torch.distributed`` is initialized: every rank must call it
    with the same terms. Scores are sent as JSON, which represents every float exactly.

    Args:
        terms: scores by name, each [B_local, N].
        device: device of the backend: "cpu" for gloo, this rank's device for NCCL.

    Returns:
        The terms, each [B, N] on the CPU, in the order of ranks, and the slice of this rank's rows.

    Raises:
        ValueError: there is no term.

    Example:
        >>> scores = TurnScores(torch.tensor([[5.0, 3.0]]), torch.ones(1, 2) > 0, {})
        >>> terms, own = gather_scores({"following": scores})
        >>> terms["following"].score[own]
        tensor([[5., 3.]])
    """
    if not terms:
        raise ValueError("terms: expected at least one, got none")
    gathered: dict[str, TurnScores] = {}
    for name, scores in terms.items():
        # One line per rank: bytes of all ranks are concatenated, and JSON holds no raw line break.
        line = TermRecord.of(scores).model_dump_json().encode() + b"\n"
        sent = torch.frombuffer(bytearray(line), dtype=torch.uint8).to(device)
        (received,), _ = gather_ranks(sent)
        lines = received.cpu().numpy().tobytes().splitlines()
        parts = [TermRecord.model_validate_json(part).scores() for part in lines]
        gathered[name] = TurnScores.concatenate(parts)
    local = len(next(iter(terms.values())))
    (_,), own = gather_ranks(torch.empty(local, dtype=torch.uint8, device=device))
    return gathered, own
