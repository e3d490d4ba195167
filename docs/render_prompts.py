"""Every judge prompt as a judge gets it: ``python -m docs.render_prompts`` writes judge_prompts.md.

The pictures are of the shapes world. The first turn was done, the second in part, the third not at
all; the answers shown are what a good judge would say, and are read by the library's own parsers.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from textwrap import TextWrapper

from PIL import Image

from examples.shapes.vision import to_pil
from examples.shapes.world import Edit, State, Thing, draw
from mteditflow.rewards import ChatAnswer, ExpectationPrompt, JudgePrompt

DOCS = Path(__file__).parent
PAGE, FOLDER = DOCS / "judge_prompts.md", DOCS / "judge_prompts"
SCALE = 20  # screen pixels to a pixel of the world
SHOWN = 140  # width of a picture within a prompt

WRAPPER = TextWrapper(100, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)

START = State(
    "gray",
    (Thing("circle", "red", "solid", (0,)), Thing("square", "blue", "solid", (3,))),
)
EDITS = (
    Edit("subject_add", "green", "triangle", "top right"),
    Edit("color_alter", "blue", "square", "yellow"),
    Edit("position_change", "red", "circle", "bottom left"),
)
INSTRUCTIONS = tuple(edit.instruction for edit in EDITS)
ANALYSES = (
    "A green triangle was asked for at the top right. It is there.",
    "The blue square was to become yellow. It changed its color, but to cyan.",
    "The red circle was to move to the bottom left. Nothing moved.",
)
SCORES = {"likert": (5, 3, 1), "binary": (1, 0, 0)}
LABELS = {"likert": {n: str(n) for n in range(1, 6)}, "binary": {1: "yes", 0: "no"}}

INTRODUCTION = """\
# What the judge is asked

Made by `python -m docs.render_prompts`; do not edit. Each prompt is one user message of text and
images, shown here in the order in which they are sent; long lines are wrapped. The wording is that
of `mteditflow/rewards/judge/wording.py`.

| image 0, the reference | image 1 | image 2 | image 3 |
|---|---|---|---|
| {pictures} |
| | {instructions} |
| | done: 5, yes | another color: 3, no | not done: 1, no |

With scope "turn" there is one request per turn, with two images; the request about turn 2 is shown.
Answers are examples. An answer without exactly one reading
([what is read](rewards.md#1-serve-the-judge)) is lost, with a reason; no score ever replaces it.
"""


def pictures() -> list[Image.Image]:
    """Return the judge's images: the reference, a good edit, a half-good one, and none."""
    added = EDITS[0].apply(START)
    things = [replace(t, color="cyan") if t.shape == "square" else t for t in added.things]
    miscolored = replace(added, things=tuple(things))
    images = [to_pil(draw(state)) for state in (START, added, miscolored, miscolored)]
    size = (SCALE * images[0].width, SCALE * images[0].height)
    return [image.resize(size, Image.Resampling.NEAREST) for image in images]


def page() -> str:
    """Write the page."""
    shown = " | ".join(_picture(f"judge_prompts/image_{n}.png") for n in range(4))
    told = " | ".join(f"“{instruction}”" for instruction in INSTRUCTIONS)
    parts = [INTRODUCTION.format(pictures=shown, instructions=told)]
    for scope, heading in (("trajectory", "One call for all turns"), ("turn", "One call per turn")):
        parts.append(f"## {heading}\n")
        kinds = itertools.product(("likert", "binary"), (True, False), ("json", "text"))
        parts += [_section(JudgePrompt(scope, *kind)) for kind in kinds]
    parts.append("## The expectation of one token\n")
    parts += [_section(ExpectationPrompt(scale)) for scale in ("likert", "binary")]
    return "\n".join(parts)


def _section(prompt: JudgePrompt | ExpectationPrompt) -> str:
    """Write one prompt: messages, request options, and how an answer is read."""
    spans = prompt.spans(len(INSTRUCTIONS))
    span = spans[len(spans) // 2]
    urls = [f"judge_prompts/image_{n}.png" for n in range(span.start, span.stop + 1)]
    request = prompt.request(INSTRUCTIONS[span.start : span.stop], urls)
    asked = []
    for part in request.content:
        text, image = part.get("text"), part.get("image_url")
        asked.append(_picture(image["url"]) if image else _fence(text))
    beside = [f"Sent beside it: `max_completion_tokens` {request.max_tokens}."]
    if request.schema is not None:
        beside[0] += " This JSON schema:"
        beside.append(_fence(json.dumps(request.schema), "json"))
    if request.top_logprobs is not None:
        beside[0] += f" `top_logprobs` {request.top_logprobs}."
    said, answer = _answer(prompt, span)
    scores = ", ".join(f"{score:.3g}" for score in request.read(answer))
    body = "\n\n".join([*asked, *beside, "An answer:", _fence(said), f"It is read as {scores}."])
    return f"<details>\n<summary><code>{prompt}</code></summary>\n\n{body}\n\n</details>\n"


def _answer(prompt: JudgePrompt | ExpectationPrompt, span: range) -> tuple[str, ChatAnswer]:
    """Return a good judge's answer about some turns: as it is shown, and as it comes."""
    scores = SCORES[prompt.scale][span.start : span.stop]
    labels = LABELS[prompt.scale]
    if isinstance(prompt, ExpectationPrompt):
        other = {"likert": 4, "binary": 1}[prompt.scale]
        likely = {labels[scores[0]]: 0.7, labels[other]: 0.2, "The": 0.1}
        said = "\n".join(f"{token!r} with probability {p}" for token, p in likely.items())
        top = tuple((token, math.log(p)) for token, p in likely.items())
        return said, ChatAnswer(text="", top_logprobs=(top,))
    pairs = list(zip(ANALYSES[span.start : span.stop], scores, strict=True))
    if prompt.answer_format == "json":
        turns = [{"analysis": analysis, "score": score} for analysis, score in pairs]
        document = {"turns": turns} if prompt.thinking else {"scores": list(scores)}
        text = json.dumps(document)
    else:
        text = "\n".join(_lines(pairs, labels, thinking=prompt.thinking))
    return text, ChatAnswer(text=text)


def _lines(
    pairs: list[tuple[str, int]], labels: dict[int, str], *, thinking: bool
) -> Iterator[str]:
    if thinking:
        yield from (f"Analysis {n}: {analysis}" for n, (analysis, _) in enumerate(pairs, start=1))
    yield from (f"Turn {n}: {labels[score]}" for n, (_, score) in enumerate(pairs, start=1))


def _fence(text: str, language: str = "text") -> str:
    lines = [line for whole in text.split("\n") for line in WRAPPER.wrap(whole) or [""]]
    return "\n".join([f"```{language}", *lines, "```"])


def _picture(path: str) -> str:
    name = Path(path).stem.replace("_", " ")
    return f'<img src="{path}" alt="{name}" width="{SHOWN}">'


def main() -> None:
    """Write the page and its pictures."""
    FOLDER.mkdir(exist_ok=True)
    for n, image in enumerate(pictures()):
        image.save(FOLDER / f"image_{n}.png", optimize=True)
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
