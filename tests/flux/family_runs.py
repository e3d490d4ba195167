"""Short runs of the presets of families beside Kontext and klein, on tiny models of their classes.

    python -m tests.flux.family_runs NAME WORLD OUTPUT [ROUND]

That one is killed in its second round; with the word "round" it ends after one, as a rank of those
that the environment names.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as edit_plus
from mteditflow_examples import train_flux
from mteditflow_examples.flux import updating
from mteditflow_examples.flux.command_line import PRESETS, tomllib
from mteditflow_examples.flux.config import Config
from mteditflow_examples.flux.config_values import typed
from mteditflow_examples.flux.soundness import checked
from mteditflow_examples.flux.start import main
from PIL import ImageStat
from PIL.Image import Image

from mteditflow.chains import Chain, write_chains
from mteditflow.rewards import Scale, TurnScores
from tests.pipelines.tiny_pipelines.base import picture
from tests.tiny_editors import CALLS, PROMPTS, build
from tests.undrawn import undraw_for_good

FAMILY_PRESETS = {
    "flux2": "flux2-dev-nft",
    "qwen-edit": "qwen-edit-nft",
    "z-image": "z-image-nft",
    "sd3.5": "sd3.5-grpo",
}
MAKERS = ("z-image", "sd3.5")  # of images from texts
FIELDS = {"height", "width", "guidance_scale", "true_cfg_scale"}  # of the configuration


class Brightness:
    """The mean of an image's red, in [0, 10]."""

    scale = Scale(0, 10, success=5)

    async def score(
        self, chains: Sequence[Chain], images: Sequence[Sequence[Image | None]]
    ) -> Mapping[str, TurnScores]:
        """Score what each turn made; of text to image there is no reference."""
        assert [own[0] is None for own in images] == [chain.image is None for chain in chains]
        made = [[image for image in own[1:] if image is not None] for own in images]
        red = [[ImageStat.Stat(x).mean[0] / 25.5 for x in own] for own in made]
        score = torch.tensor(red, dtype=torch.float32)
        return {"following": TurnScores(score, torch.ones_like(score, dtype=torch.bool), {})}


def small_pictures() -> None:
    """Let Qwen-Image-Edit work with fewer pixels than a megapixel."""
    edit_plus.VAE_IMAGE_SIZE, edit_plus.CONDITION_IMAGE_SIZE = 256 * 256, 64 * 64


def make_family_world(name: str, folder: Path) -> Path:
    """A model, chains to train on and chains to evaluate on."""
    build(name).save_pretrained(folder / "model")
    for part, numbers in (("train", range(4)), ("held_out", range(4, 6))):
        chains = []
        for k in numbers:
            image = None if name in MAKERS else f"{k}.png"
            if image is not None:
                picture(64, seed=k).save(folder / image)
            words = [f"{PROMPTS[(k + turn) % 3]} {k}" for turn in range(1 if image is None else 2)]
            chains.append(Chain(id=str(k), image=image, instructions=tuple(words), root=folder))
        write_chains(chains, folder / f"{part}.jsonl")
    return folder


def configuration(name: str, world: Path, output: Path, **sections: Mapping[str, Any]) -> Config:
    """The preset of a family with a tiny model and few of everything; its objective as it is."""
    values = tomllib.loads((PRESETS / f"{FAMILY_PRESETS[name]}.toml").read_text(encoding="utf-8"))
    call = CALLS[name]
    guidance = next(x for key, x in call.items() if key in ("guidance_scale", "true_cfg_scale"))
    small: dict[str, dict[str, Any]] = {
        "model": {
            "path": str(world / "model"),
            "dtype": "float32",
            "resolution": call["height"],
            "guidance": guidance,
            "options": {k: v for k, v in call.items() if k not in FIELDS},
            "lora_rank": 2,
            "lora_alpha": 4,
            "checkpointing": False,
        },
        "data": {
            "chains": str(world / "train.jsonl"),
            "held_out": str(world / "held_out.jsonl"),
            "turns": 1 if name in MAKERS else 2,
            "groups": 2,
            "group_size": 2,
        },
        "sampling": {"steps": 3, "batch": 4},
        "rewards": {
            "scorer": "tests.flux.family_runs:Brightness",
            "weights": {"following": 1.0},
        },
        "training": {"rounds": 2, "batch": 4, "learning_rate": 1e-2},
        "evaluation": {"every": 2, "steps": 2, "batch": 2},
        "output": {
            "folder": str(output),
            "trackers": [],
            "strips_every": 0,
            "checkpoint_every": 1,
        },
    }
    if values["objective"]["name"] == "grpo":
        small["objective"] = {"stochastic_steps": 2}
    for part in (small, sections):
        for section, fields in part.items():
            values[section] = {**values.get(section, {}), **fields}
    return checked(typed(values))


def run(name: str, world: Path, output: Path, **sections: Mapping[str, Any]) -> None:
    """Train to the end in this process."""
    main(train_flux.train, configuration(name, world, output, **sections))


def run_one_round(name: str, world: Path, output: Path) -> None:
    """Train one round, and evaluate nothing."""
    run(name, world, output, data={"held_out": None}, training={"rounds": 1})


def run_killed(name: str, world: Path, output: Path) -> None:
    """Train, and kill this process in the second round, before its update."""
    updates, update = [0], updating.update

    def doomed(*given: Any) -> None:
        updates[0] += 1
        if updates[0] == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        update(*given)

    updating.update = doomed
    run(name, world, output)


if __name__ == "__main__":
    small_pictures()
    undraw_for_good()
    places = Path(sys.argv[2]), Path(sys.argv[3])
    if sys.argv[4:] == ["round"]:
        run_one_round(sys.argv[1], *places)
    else:
        run_killed(sys.argv[1], *places)
