"""Plan one chain: objects of the image, edit types, and turn by turn the edit in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import anyio
import anyio.to_thread
from PIL import Image

from mteditflow._checks import check_choice, check_count, check_number
from mteditflow.chains import Chain, TaskType
from mteditflow.planner.edits import EDITS
from mteditflow.planner.filling import Filled, edit_prompt, edit_schema, read_edit
from mteditflow.planner.listing import (
    LISTING_PROMPT,
    find_objects,
    listing_schema,
    read_objects,
    sift,
)
from mteditflow.planner.pool import ListedObject, Pool, chain_fields
from mteditflow.rewards import Fault, Lost
from mteditflow.rewards.consistency.scorer import Detector
from mteditflow.rewards.images import png_data_url
from mteditflow.rewards.transport.chat import ChatClient

LISTING_TOKENS, EDIT_TOKENS = 2048, 1024
SEED_BITS = 20
UNREACHABLE = (Fault.connection, Fault.unavailable)


class PlanningStoppedError(RuntimeError):
    """No endpoint can be reached: what is planned is kept, and the same call goes on from there."""


@dataclass(frozen=True)
class Refused:
    """A chain that was not planned.

    Attributes:
        reason: kind of failure; few enough to be counted.
        detail: what was expected and what came.
    """

    reason: str
    detail: str


@dataclass(frozen=True)
class Scene:
    """Objects of one image.

    Attributes:
        picture: the image as part of a message.
        objects: those that were listed and found.
        left_out: names of those that were listed alone, and attributes that are odd, each with the
            reason.
    """

    picture: dict[str, Any]
    objects: tuple[ListedObject, ...]
    left_out: Mapping[str, str]


def draw_tasks(
    random: Random, turns: int, weights: Mapping[TaskType, float] | None = None
) -> tuple[TaskType, ...]:
    """Draw edit types without repetition.

    Args:
        random: source of the draws.
        turns: how many to draw.
        weights: edit type to weight, >= 0; those not named have 0. ``None`` draws evenly.

    Returns:
        The types in the order of the turns.

    Raises:
        ValueError: there are fewer types with a weight than turns, or a name or weight is wrong.

    Example:
        >>> draw_tasks(Random(0), 2, {"subject_add": 1.0, "text_change": 3.0})
        ('text_change', 'subject_add')
    """
    check_count("turns", turns)
    given = dict.fromkeys(EDITS, 1.0) if weights is None else weights
    for task, weight in given.items():
        check_choice("weights", task, tuple(EDITS))
        check_number(f"weights[{task!r}]", weight, low=0.0)
    left = {task: weight for task, weight in given.items() if weight > 0}
    if len(left) < turns:
        raise ValueError(
            f"turns: expected at most {len(left)}, the number of edit types with a weight, "
            f"got {turns}"
        )
    drawn: list[TaskType] = []
    for _ in range(turns):
        drawn += random.choices(list(left), list(left.values()))
        del left[drawn[-1]]
    return tuple(drawn)


def planner_settings(
    client: ChatClient, turns: int, seed: int, weights: Mapping[TaskType, float] | None
) -> dict[str, Any]:
    """Options that chains depend on, beside images, answers and detector; see ``Planner``."""
    drawn = None if weights is None else dict(weights)
    return {**client.settings, "turns": turns, "seed": seed, "weights": drawn}


class Planner:
    """Plans chains of edits from images alone, the same for the same seed and answers.

    Args:
        client: of the model that lists objects, fills slots and writes instructions. At
            temperature 0 the chains of one image that draw the same edit types are alike.
        detector: finds listed objects; one of them that it does not find is left out.
        turns: edits in a chain, N; at most the number of types that may be drawn.
        seed: of the drawing of edit types.
        weights: edit type to weight; ``None`` draws them evenly.

    Raises:
        ValueError: as in ``draw_tasks``.
    """

    def __init__(
        self,
        client: ChatClient,
        detector: Detector,
        *,
        turns: int = 3,
        seed: int = 0,
        weights: Mapping[TaskType, float] | None = None,
    ) -> None:
        draw_tasks(Random(seed), turns, weights)
        self.turns, self.seed, self.weights = turns, seed, weights
        self._client, self._detector = client, detector
        self._detecting = anyio.CapacityLimiter(1)

    @property
    def settings(self) -> dict[str, Any]:
        """Options that chains depend on, beside images and answers; written into each chain."""
        return planner_settings(self._client, self.turns, self.seed, self.weights)

    async def look(self, image: Image.Image) -> Scene | Refused:
        """List the objects of an image and keep those that the detector finds.

        Args:
            image: of mode RGB.

        Raises:
            PlanningStoppedError: no endpoint can be reached.
        """
        url = await anyio.to_thread.run_sync(png_data_url, image)
        picture = {"type": "image_url", "image_url": {"url": url}}
        listed = await self._client.ask(
            [picture, {"type": "text", "text": LISTING_PROMPT}],
            lambda answer: read_objects(answer.text),
            schema=listing_schema(),
            max_tokens=LISTING_TOKENS,
            seed=Random(self.seed).getrandbits(SEED_BITS),
        )
        if isinstance(listed, Lost):
            return _refused("objects", listed)
        boxes = await anyio.to_thread.run_sync(
            find_objects, self._detector, image, listed.objects, limiter=self._detecting
        )
        objects, unseen = sift(listed.objects, boxes, image.size)
        left_out = listed.left_out | unseen
        if not objects:
            return Refused("no object was found", f"listed were {left_out or 'none'}")
        return Scene(picture, objects, left_out)

    async def plan(self, scene: Scene, *, chain_id: str, image: str) -> Chain | Refused:
        """Plan one chain.

        Args:
            scene: what ``look`` saw.
            chain_id: names the chain; the drawing depends on it.
            image: path to write into the chain.

        Returns:
            The chain, or why it was not planned.

        Raises:
            PlanningStoppedError: no endpoint can be reached.
        """
        random = Random(f"{self.seed} {chain_id}")
        pools, instructions = [Pool.of(scene.objects)], list[str]()
        for drawn in draw_tasks(random, self.turns, self.weights):
            pool = pools[-1]
            task = drawn if pool.obstacle(drawn) is None else "subject_add"
            seed = random.getrandbits(SEED_BITS)
            filled = await self._fill(scene, pool, instructions, task, seed)
            if isinstance(filled, Lost):
                return _refused("edit", filled)
            pools.append(filled.pool)
            instructions.append(filled.instruction)
        record = {"id": chain_id, "image": image, "instructions": tuple(instructions)}
        made = {
            "settings": self.settings,
            "objects": [x.model_dump() for x in scene.objects],
            "left_out": dict(scene.left_out),
        }
        return Chain.model_validate({**record, **chain_fields(pools), "planner": made})

    async def _fill(
        self, scene: Scene, pool: Pool, instructions: Sequence[str], task: TaskType, seed: int
    ) -> Filled | Lost:
        return await self._client.ask(
            [scene.picture, {"type": "text", "text": edit_prompt(pool, instructions, task)}],
            lambda answer: read_edit(answer.text, pool, task),
            schema=edit_schema(pool, task),
            max_tokens=EDIT_TOKENS,
            seed=seed,
        )


def _refused(what: str, lost: Lost) -> Refused:
    """Return the refusal of one chain, unless the failure is that of all to come."""
    if lost.fault in UNREACHABLE:
        raise PlanningStoppedError(f"planning stopped: {lost}")
    return Refused(f"{what}: {lost.fault.value}", str(lost))
