"""Detection of a model's reasoning before its answer, and the error of reasoning without one."""

from __future__ import annotations

from mteditflow.rewards.faults import AnswerError, Fault

THINK, THINK_END = "<think>", "</think>"  # in the text of servers that do not separate reasoning
SHOWN = 200  # characters of reasoning in an error's detail
FIX = (
    'turn reasoning off (chat_template_kwargs {"enable_thinking": false}) or raise reasoning_tokens'
)


def has_reasoning(text: str) -> bool:
    """Return whether a text contains reasoning in tags.

    Example:
        >>> has_reasoning("Maybe 5. No.</think>4"), has_reasoning("4")
        (True, False)
    """
    return THINK_END in text or text.lstrip().startswith(THINK)


def reasoning_alone(thoughts: str) -> AnswerError:
    """Return the error of an answer that consists of reasoning only.

    Example:
        >>> reasoning_alone("Maybe 5.").fault
        <Fault.reasoning: 'reasoning without an answer'>
    """
    came = f"got only {thoughts[:SHOWN]!r}"
    return AnswerError(Fault.reasoning, f"expected an answer after the reasoning, {came}; {FIX}")
