"""Instruction following scored by a vision-language model behind OpenAI-compatible endpoints."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import anyio
import anyio.to_thread
import torch
from PIL import Image
from tqdm import tqdm

from mteditflow._checks import check_count
from mteditflow.chains import Chain
from mteditflow.rewards.faults import Lost
from mteditflow.rewards.images import png_data_url, to_rgb
from mteditflow.rewards.judge.prompts import Prompt, Request
from mteditflow.rewards.scores import TurnScores
from mteditflow.rewards.transport.chat import ChatClient
from mteditflow.rewards.transport.concurrency import gather

Marks = tuple[float, ...] | Lost  # scores of some turns, or the reason why they are lost


class Judge:
    """Scorer of how well each turn of a chain followed its instruction, by a model.

    A lost answer loses the turns of its request: one turn if the prompt asks about each turn
    separately, all turns of the chain if it asks once.

    Args:
        client: client of the model's endpoints.
        prompt: a ``JudgePrompt`` or an ``ExpectationPrompt``.
        votes: number of answers to average, each with its own seed. If fewer than half of them can
            be parsed, the turn is lost. Averages of binary scores are fractions: aggregate them
            with ``mteditflow.turn_average``.
        chains_at_once: maximum number of chains whose encoded images are in memory at once. A value
            below the client's ``concurrency`` limits that too.

    Raises:
        ValueError: a count is below 1, or there are several votes at temperature 0, where all
            answers are equal.

    Example:
        >>> from mteditflow.rewards import JudgePrompt
        >>> client = ChatClient(["http://127.0.0.1:9/v1"], "qwen3-vl", attempts=1)
        >>> chain = Chain(id="7", image="7.png", instructions=("Remove the cat",))
        >>> images = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
        >>> scores = anyio.run(Judge(client, JudgePrompt()).score, [chain], [images])
        >>> scores.score, scores.reasons
        (tensor([[nan]]), {'no connection': 1})
    """

    def __init__(
        self, client: ChatClient, prompt: Prompt, *, votes: int = 1, chains_at_once: int = 64
    ) -> None:
        check_count("votes", votes)
        check_count("chains_at_once", chains_at_once)
        if votes > 1 and client.temperature == 0:
            raise ValueError(f"votes: expected 1 at temperature 0, got {votes}: all would be equal")
        self.client, self.prompt, self.votes = client, prompt, votes
        self._chains_at_once = chains_at_once

    async def score(
        self,
        chains: Sequence[Chain],
        images: Sequence[Sequence[Image.Image]],
        *,
        progress: bool = False,
    ) -> TurnScores:
        """Score every turn of B chains.

        Args:
            chains: B chains with their instructions.
            images: for each chain N + 1 images: the reference, then the result of each turn.
            progress: whether to show a bar that counts answers.

        Returns:
            Scores [B, N], float32, in the order of ``chains``, with N turns of the longest chain;
            in 1..5 or 0..1, by the prompt's scale.

        Raises:
            ValueError: there is no chain, or its images are too few, too many or unreadable.
            TypeError: an image is not a PIL image.
        """
        pictures = await anyio.to_thread.run_sync(check_images, chains, images)
        answers = self.votes * sum(len(self.prompt.spans(chain.turns)) for chain in chains)
        slots = anyio.Semaphore(self._chains_at_once)
        with tqdm(total=answers, desc="judge", unit="answer", disable=not progress) as bar:
            marks = await gather(
                [
                    partial(self._score_chain, chain, own, slots, bar)
                    for chain, own in zip(chains, pictures, strict=True)
                ]
            )
        return turn_scores(chains, marks)

    async def _score_chain(
        self, chain: Chain, images: list[Image.Image], slots: anyio.Semaphore, bar: tqdm[None]
    ) -> list[tuple[range, Marks]]:
        """Score each span of turns; each image is encoded once, off the event loop."""
        async with slots:
            urls = await anyio.to_thread.run_sync(lambda: [png_data_url(x) for x in images])
            spans = self.prompt.spans(chain.turns)
            requests = [
                self.prompt.request(
                    chain.instructions[span.start : span.stop], urls[span.start : span.stop + 1]
                )
                for span in spans
            ]
            marks = await gather([partial(self._vote, request, bar) for request in requests])
        return list(zip(spans, marks, strict=True))

    async def _vote(self, request: Request, bar: tqdm[None]) -> Marks:
        async def ask(seed: int) -> Marks:
            marks = await self.client.ask(
                request.content,
                request.read,
                max_tokens=request.max_tokens,
                schema=request.schema,
                top_logprobs=request.top_logprobs,
                seed=seed,
            )
            bar.update()
            return marks

        votes = await gather([partial(ask, seed) for seed in range(self.votes)])
        read = [vote for vote in votes if not isinstance(vote, Lost)]
        lost = [vote for vote in votes if isinstance(vote, Lost)]
        # With half of the votes lost, the others still count; the mean is over those only.
        if len(lost) > len(read):
            return lost[0]
        return tuple(sum(scores) / len(read) for scores in zip(*read, strict=True))


def check_images(
    chains: Sequence[Chain], images: Sequence[Sequence[Image.Image]]
) -> list[list[Image.Image]]:
    """Convert all images to RGB and load them, so that threads may share them.

    Args:
        chains: B chains, at least one.
        images: for each chain N + 1 images: the reference, then the result of each turn.

    Returns:
        The images in the same order, loaded, in 8-bit RGB.

    Raises:
        ValueError: there is no chain, or its images are too few, too many or unreadable.
        TypeError: an image is not a PIL image.
    """
    if not chains or len(images) != len(chains):
        raise ValueError(
            "images: expected a list for each chain, and at least one chain, "
            f"got {len(images)} lists for {len(chains)} chains"
        )
    for b, (chain, own) in enumerate(zip(chains, images, strict=True)):
        if len(own) != chain.turns + 1:
            raise ValueError(
                f"images[{b}]: expected the reference and one image for each of {chain.turns} "
                f"turns, got {len(own)} images"
            )
    return [
        [to_rgb(f"images[{b}][{n}]", image) for n, image in enumerate(own)]
        for b, own in enumerate(images)
    ]


def turn_scores(
    chains: Sequence[Chain], marks: Sequence[Sequence[tuple[range, Marks]]]
) -> TurnScores:
    """Arrange the scores of B chains as [B, N], float32.

    Args:
        chains: B chains, at least one.
        marks: for each chain spans of turns, counted from 0, with their scores or their loss.
    """
    turns = torch.tensor([chain.turns for chain in chains], dtype=torch.int64, device="cpu")
    turn_mask = torch.arange(int(turns.max()), dtype=torch.int64, device="cpu") < turns[:, None]
    score = torch.full(turn_mask.shape, torch.nan, dtype=torch.float32, device="cpu")
    lost: dict[tuple[int, int], Lost] = {}
    for b, own in enumerate(marks):
        for span, result in own:
            if isinstance(result, Lost):
                lost |= {(b, n): result for n in span}
            else:
                score[b, span.start : span.stop] = torch.tensor(
                    result, dtype=torch.float32, device="cpu"
                )
    return TurnScores(score, turn_mask, lost)
