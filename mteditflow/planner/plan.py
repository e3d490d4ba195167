"""Planning of one chain: list the objects, draw edit types, and fill each edit turn by turn."""

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
    """No endpoint can be reached; planned chains are kept, and the same call resumes from them."""


@dataclass(frozen=True)
class Refused:
    """Failure to plan a chain.

    Attributes:
        reason: kind of failure, out of few, for counting.
        detail: what was expected, and what the planner got.
    """

    reason: str
    detail: str


@dataclass(frozen=True)
class Scene:
    """Objects of one image.

    Attributes:
        picture: the image as a part of a chat message.
        objects: objects that the model listed and the detector found.
        left_out: reason by name of each other listed object, and by "<name>: <attribute>" of each
            invalid attribute.
    """

    picture: dict[str, Any]
    objects: tuple[ListedObject, ...]
    left_out: Mapping[str, str]


def draw_tasks(
    random: Random, turns: int, weights: Mapping[TaskType, float] | None = None
) -> tuple[TaskType, ...]:
    """Draw edit types without repetition.

    Args:
        random: random number generator.
        turns: number of types to draw.
        weights: weight by edit type, >= 0; types that are missing have weight 0. ``None``: all have
            equal weights.

    Returns:
        The types in the order of the turns.

    Raises:
        ValueError: fewer types than ``turns`` have a weight, a type is unknown, or a weight is
            negative or not finite.

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
    """Return the options on which chains depend, besides images, answers and detector."""
    drawn = None if weights is None else dict(weights)
    return {**client.settings, "turns": turns, "seed": seed, "weights": drawn}


class Planner:
    """Planner of chains of edits from images alone; equal seed and answers give equal chains.

    Args:
        client: client of the model that lists objects, fills slots and writes instructions. At
            temperature 0, chains of one image with the same edit types are equal.
        detector: detector of listed objects; objects that it does not find are left out.
        turns: edits in a chain, N; at most the number of types with a weight.
        seed: seed of the draw of edit types, and of the model's sampling.
        weights: weight by edit type; ``None``: all have equal weights.

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
        self._detecting = anyio.CapacityLimiter(1)  # one detection at a time, in a worker thread

    @property
    def settings(self) -> dict[str, Any]:
        """Return the options on which chains depend; they are written into each chain."""
        return planner_settings(self._client, self.turns, self.seed, self.weights)

    async def look(self, image: Image.Image) -> Scene | Refused:
        """List the objects of an image, and keep those that the detector finds.

        Args:
            image: image of mode RGB.

        Returns:
            The scene, or the reason why there is none.

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
            scene: result of ``look``.
            chain_id: id of the chain, on which the draw of edit types depends.
            image: path to write into the chain.

        Returns:
            The chain, or the reason why it was not planned.

        Raises:
            PlanningStoppedError: no endpoint can be reached.
        """
        # One generator per chain, so that a resumed run draws the same edit types.
        random = Random(f"{self.seed} {chain_id}")
        pools, instructions = [Pool.of(scene.objects)], list[str]()
        for drawn in draw_tasks(random, self.turns, self.weights):
            pool = pools[-1]
            # An addition needs no object, so it is possible in every pool.
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
    """Return the refusal of one chain; raise if the failure would be that of all further ones."""
    if lost.fault in UNREACHABLE:
        raise PlanningStoppedError(f"planning stopped: {lost}")
    return Refused(f"{what}: {lost.fault.value}", str(lost))
