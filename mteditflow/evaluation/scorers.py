"""Published reward models as scorers for a trainer: EditReward, EditScore, PickScore.

Each scores turn by turn, from the image before, the image after and the instruction. A missing
score is lost with its reason. A model's package is imported only when it is needed. Needs the extra
``mteditflow[rewards]``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from mteditflow._checks import check_count
from mteditflow.evaluation.turn_scorer import EditedTurn, Marks, TurnScorer
from mteditflow.rewards import Fault, Lost, Scale

if TYPE_CHECKING:
    from mteditflow.evaluation.preference import PreferenceModel

GUESSED = "guess_if_cannot_parse"  # EditScore's mark of a score that it drew at random
EDIT_SCORE = {  # term to the key of EditScore's answer and the upper end of the term's range
    "following": ("prompt_following", 10.0),
    "consistency": ("consistency", 1.0),
    "quality": ("perceptual_quality", 1.0),
    "edit_score": ("overall", 1.0),
}
# Errors of EditScore on an answer that it cannot parse; others, such as out of memory, propagate.
FAILURES = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


class EditRewardModel(Protocol):
    """Public interface of EditReward's ``EditRewardInferencer``."""

    def reward(self, *, prompts: list[str], image_src: list[Any], image_paths: list[Any]) -> Tensor:
        """Return [K, D], whose first column is the score of each edit: unbounded, higher better."""
        ...


class EditRewardScorer(TurnScorer):
    """EditReward: human preference for an edit, given its source and its instruction.

    "following" is the sigmoid of the score, in [0, 1]; "edit_reward" is the score itself. Scores
    rank edits and have no natural zero, so choose the threshold of success from the scores of your
    editor.

    EditReward is on no package index: clone it, put its folder on ``PYTHONPATH``, and pass your own
    class to the trainer::

        from EditReward import EditRewardInferencer
        from mteditflow.evaluation import EditRewardScorer

        class Scorer(EditRewardScorer):
            def __init__(self):
                super().__init__(EditRewardInferencer(config_path=..., checkpoint_path=...))

    Args:
        model: an ``EditRewardInferencer``, or any object with its method ``reward``; it receives
            PIL images.
        batch_size: number of edits in one call.

    Raises:
        ValueError: the batch size is below 1.
        TypeError: the model has no method ``reward``.

    Source: EditReward (arXiv 2509.26346), by the interface that its public code documents.
    """

    terms = ("following", "edit_reward")
    scale = Scale(0, 1, success=0.5)

    def __init__(self, model: EditRewardModel, *, batch_size: int = 8) -> None:
        super().__init__()
        check_count("batch_size", batch_size)
        require_method(
            model, "reward", "EditRewardInferencer of github.com/TIGER-AI-Lab/EditReward"
        )
        self.model, self.batch_size = model, batch_size

    @torch.no_grad()
    def score_turns(self, turns: Sequence[EditedTurn]) -> list[Marks]:
        """See ``TurnScorer``.

        Raises:
            ValueError: the model returns another number of scores.
        """
        marks: list[Marks] = []
        for start in range(0, len(turns), self.batch_size):
            batch = turns[start : start + self.batch_size]
            rewards = self.model.reward(
                prompts=[x.instruction for x in batch],
                image_src=[x.before for x in batch],
                image_paths=[x.after for x in batch],
            )
            values = rewards.float().reshape(len(rewards), -1)[:, 0].tolist()
            if len(values) != len(batch):
                raise ValueError(f"rewards: expected {len(batch)}, one for each edit, got {values}")
            marks += [self._marks(x) for x in values]
        return marks

    def _marks(self, value: float) -> Marks:
        if not math.isfinite(value):
            return Lost(Fault.not_a_number, f"expected a finite score, got {value}", attempts=1)
        bounded = 0.5 + 0.5 * math.tanh(value / 2)  # the sigmoid, without overflow of exp
        return {"following": bounded, "edit_reward": value}


class EditScoreModel(Protocol):
    """Public interface of ``editscore.EditScore``."""

    def evaluate(self, image_prompts: list[Image.Image], text_prompt: str) -> Mapping[str, Any]:
        """Return the scores of an edit, [source, edited] and instruction, each aspect in 0..10."""
        ...


class EditScoreScorer(TurnScorer):
    """EditScore: scores of an edit by a vision-language model, aspect by aspect.

    "following" is EditScore's prompt following in 0..10; "consistency", "quality" and "edit_score"
    are its consistency, perceptual quality and overall score, in [0, 1].

    When EditScore cannot parse its model's answer, it draws a random score and marks it in the
    reasoning of the last pass; its ``batch_evaluate`` inserts half of the range without a mark. So
    edits are evaluated one at a time in a single pass, and a marked score is lost.

    Args:
        model: an ``editscore.EditScore``, or any object with its method ``evaluate``; None loads
            EditScore-7B with the settings of its authors' example.

    Raises:
        ImportError: no model is given, and editscore is not installed.
        ValueError: the model uses several passes.
        TypeError: the model has no method ``evaluate``.

    Source: EditScore (arXiv 2509.23909); editscore 0.2.
    """

    terms = tuple(EDIT_SCORE)
    scale = Scale(0, 10, success=8)

    def __init__(self, model: EditScoreModel | None = None) -> None:
        super().__init__()
        if model is None:
            model = _default_edit_score()
        require_method(model, "evaluate", "editscore.EditScore")
        passes = getattr(model, "num_pass", 1)
        if passes != 1:
            raise ValueError(
                f"model: expected num_pass 1, since a guess is marked in the last pass alone, got "
                f"{passes}"
            )
        self.model = model

    def score_turns(self, turns: Sequence[EditedTurn]) -> list[Marks]:
        """See ``TurnScorer``."""
        return [self._score(turn) for turn in turns]

    def _score(self, turn: EditedTurn) -> Marks:
        try:
            answer = self.model.evaluate([turn.before, turn.after], turn.instruction)
            said = f"{answer['SC_reasoning']} {answer['PQ_reasoning']}"
            if GUESSED in said:
                return Lost(Fault.format, f"expected scores, got {said[:200]!r}", attempts=1)
            values = {term: float(answer[key]) for term, (key, _) in EDIT_SCORE.items()}
        except FAILURES as error:
            return Lost(Fault.format, f"{type(error).__name__}: {error}", attempts=1)
        wrong = [x for x in values.values() if not 0 <= x <= 10]
        if wrong:
            return Lost(Fault.out_of_range, f"expected 0..10, got {wrong[0]}", attempts=1)
        return {term: x * EDIT_SCORE[term][1] / 10 for term, x in values.items()}


class PickScoreScorer(TurnScorer):
    """PickScore of each turn's image for its instruction, as a training reward.

    The model does not see the image before and was trained on captions, so an image that shows the
    instruction's subject scores well even if nothing changed. Use it with another reward.

    Args:
        model: preference model, such as ``PickScore.from_pretrained(path)``; None loads the
            authors' model.

    Raises:
        ImportError: no model is given, and transformers is not installed.
        TypeError: the model cannot be called.

    Source: Pick-a-Pic (arXiv 2305.01569).
    """

    terms = ("following",)
    scale = Scale(-100, 100, success=20)  # 100 times a cosine; good images score about 20

    def __init__(self, model: PreferenceModel | None = None) -> None:
        super().__init__()
        if model is None:
            from mteditflow.evaluation.preference import PickScore

            model = PickScore.from_pretrained()
        require_method(model, "__call__", "mteditflow.evaluation.PickScore")
        self.model = model

    def score_turns(self, turns: Sequence[EditedTurn]) -> list[Marks]:
        """See ``TurnScorer``."""
        values = self.model([x.after for x in turns], [x.instruction for x in turns])
        return [
            {"following": x}
            if math.isfinite(x)
            else Lost(Fault.not_a_number, f"expected a finite score, got {x}", attempts=1)
            for x in values.tolist()
        ]


def require_method(model: object, name: str, expected: str) -> None:
    """Raise ``TypeError`` unless a model has a method."""
    if not callable(getattr(model, name, None)):
        raise TypeError(f"model: expected {expected}, got {type(model).__name__}")


def _default_edit_score() -> EditScoreModel:
    """Load EditScore-7B with the settings of its authors' first example.

    Raises:
        ImportError: editscore is not installed.
    """
    try:
        from editscore import EditScore
    except ImportError as error:
        raise ImportError(
            f"EditScoreScorer needs {error.name}: pip install editscore, and its vllm or "
            "transformers; or give a model"
        ) from error
    model: EditScoreModel = EditScore(
        backbone="qwen25vl",
        model_name_or_path="Qwen/Qwen2.5-VL-7B-Instruct",
        enable_lora=True,
        lora_path="EditScore/EditScore-7B",
        score_range=25,
        num_pass=1,
    )
    return model
