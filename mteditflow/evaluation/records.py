"""JSON records of evaluations: every score exactly, or the reason why it is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from mteditflow.chains.record import first_error
from mteditflow.evaluation.provenance import Provenance
from mteditflow.rewards import Fault, Lost, TurnScores


class LostRecord(BaseModel):
    """Lost score of a chain's turn, both counted from 0, with its reason."""

    model_config = ConfigDict(extra="forbid", strict=True)

    chain: int
    turn: int
    fault: Fault
    detail: str
    attempts: int


class TermRecord(BaseModel):
    """Scores [C, N], ``None`` for NaN; JSON restores float32 and float64 exactly."""

    model_config = ConfigDict(extra="forbid", strict=True)

    dtype: Literal["float32", "float64"]
    score: list[list[float | None]]
    turn_mask: list[list[bool]]
    lost: list[LostRecord]

    @classmethod
    def of(cls, scores: TurnScores) -> TermRecord:
        """Return the record of scores."""
        lost = [
            LostRecord(chain=c, turn=n, fault=x.fault, detail=x.detail, attempts=x.attempts)
            for (c, n), x in sorted(scores.lost.items())
        ]
        rows = [[None if x != x else x for x in row] for row in scores.score.tolist()]
        return cls(
            dtype="float64" if scores.score.dtype == torch.float64 else "float32",
            score=rows,
            turn_mask=scores.turn_mask.tolist(),
            lost=lost,
        )

    def scores(self) -> TurnScores:
        """Return the scores of the record.

        Raises:
            ValueError: rows differ in length, or scores, mask and losses contradict each other.
        """
        rows = [[torch.nan if x is None else x for x in row] for row in self.score]
        score = torch.tensor(rows, dtype=getattr(torch, self.dtype), device="cpu")
        lost = {(x.chain, x.turn): Lost(x.fault, x.detail, x.attempts) for x in self.lost}
        return TurnScores(score, torch.tensor(self.turn_mask, dtype=torch.bool, device="cpu"), lost)


class EvaluationRecord(BaseModel):
    """Content of an evaluation's file; without a provenance, the judge is unknown."""

    model_config = ConfigDict(extra="forbid", strict=True)

    round: int
    success_at: float
    chain_ids: tuple[str, ...]
    instructions: tuple[tuple[str, ...], ...]
    terms: dict[str, TermRecord]
    provenance: Provenance = Provenance()

    @classmethod
    def parse(cls, path: Path) -> EvaluationRecord:
        """Read a file.

        Raises:
            ValueError: it is not such a record; the message names file, place and reason.
            OSError: it cannot be read.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise ValueError(f"{path}: {first_error(error)}") from error
