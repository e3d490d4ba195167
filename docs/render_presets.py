"""Families times objectives: ``python -m docs.render_presets`` writes families.md and .json.

Each cell takes one optimizer step of an objective on a recorded rollout of a tiny pipeline of the
real classes, and asks whether trajectories of positive advantage have become likelier and those of
negative advantage less likely. A cell whose interval does not lie above 0 ends the command with
exit code 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
import transformers
from torch import Tensor

from mteditflow import trajectory_generators
from mteditflow.evaluation.seeds import SeedInterval, mean_interval
from mteditflow.objectives import (
    AWM,
    CRD,
    DGPO,
    DPO,
    DPPO,
    GRPO,
    NFT,
    FlowAWR,
    Guard,
    Objective,
    Renoise,
    RoundKey,
)
from mteditflow.objectives.forward import renoise
from mteditflow.pipelines import Editor, LoraPolicies, Rollout, RolloutVelocity

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "pipelines")]  # the tests' tiny pipelines

from mteditflow_examples.shapes.editor import build_klein, build_kontext, call_options  # noqa: E402

from tests.flux.family_runs import MAKERS, small_pictures  # noqa: E402
from tests.pipelines.tiny_pipelines.base import picture  # noqa: E402
from tests.tiny_editors import CALLS, PROMPTS, build  # noqa: E402

PAGE = Path(__file__).parent / "families.md"
SEEDS, STEPS, GROUPS, MEMBERS = 5, 3, 2, 4
RATE = 1e-3
LEVELS = Renoise(levels=8, stratified=True)  # flow times at which a latent's likelihood is judged
OBJECTIVES: dict[str, Objective] = {
    "NFT": NFT(renoise=Renoise(levels=4)),
    "AWM": AWM(renoise=Renoise(levels=4)),
    "FlowAWR": FlowAWR(renoise=Renoise(levels=4)),
    "DPO": DPO(renoise=Renoise(levels=4)),
    "DGPO": DGPO(renoise=Renoise(levels=4)),
    "CRD": CRD(renoise=Renoise(levels=4)),
    "GRPO": GRPO(stochastic_steps=2),
    "Guard": Guard(stochastic_steps=2),
    "DPPO": DPPO(stochastic_steps=2),
}
PRESETS = {
    "kontext": "kontext-nft, kontext-24gb-nft, kontext-grpo",
    "klein": "klein-nft, klein-4b-nft",
    "flux2": "flux2-dev-nft",
    "qwen-edit": "qwen-edit-nft",
    "z-image": "z-image-nft",
    "sd3.5": "sd3.5-grpo",
}
INTRODUCTION = """\
# Families and objectives

Made by `python -m docs.render_presets` with torch {torch}, diffusers {diffusers} and transformers
{transformers}; do not edit. The same facts are in [families.json](families.json).

Each cell is one optimizer step (AdamW, learning rate {rate:g}) of an objective with its default
hyperparameters, except that it has four noise levels or two stochastic steps a turn. Pipelines are
complete and tiny, of the real classes, with random weights, in float32 on a CPU:
{groups} groups of {members} trajectories of two turns (one for text to image), {steps} steps, LoRA
adapters of rank 4, random advantages normalized within groups. The number is the cosine between
advantages and changes of likelihood, over trajectories. The likelihood is the log-prob of the
recorded steps if the objective replays steps, else minus the flow-matching loss of the final
latents at fresh noise. Above 0 means that good trajectories became likelier.
Means over {seeds} seeds with
95% t-intervals.

| family | presets |{columns}
|---|---|{rule}
"""


class World(NamedTuple):
    """An editor of a family with policies on it, ready to be trained again and again."""

    editor: Editor
    policies: LoraPolicies
    initial: dict[str, Tensor]
    turns: int


def make_world(family: str, folder: Path) -> World:
    """Load a tiny editor of a family from disk, with adapters."""
    if family in CALLS:
        pipeline, call = build(family), dict(CALLS[family])
    else:
        pipeline = {"kontext": build_kontext, "klein": build_klein}[family]()
        call = call_options(pipeline, steps=STEPS)
        del call["output_type"]
        call |= {"guidance_scale": 4.0} if family == "klein" else {}
    pipeline.save_pretrained(folder / family)
    editor = Editor.load(folder / family, call=call | {"num_inference_steps": STEPS})
    policies = LoraPolicies(editor.transformer, editor.lora(rank=4, alpha=8))
    turns = 1 if family in MAKERS else 2
    return World(editor, policies, policies.state_dict("current"), turns)


def cell(world: World, objective: Objective, seed: int) -> float:
    """Return the cosine of advantages and changes of likelihood of one step."""
    policies = world.policies
    for name in ("current", "old"):
        policies.load_state_dict(world.initial, name)
    rollout = roll_out(world, objective, seed)
    random = torch.Generator().manual_seed(seed)
    advantage = torch.randn(GROUPS, MEMBERS, generator=random)
    advantage = advantage - advantage.mean(dim=1, keepdim=True)
    advantage = (advantage / advantage.std(dim=1, keepdim=True)).flatten()
    velocity, key = RolloutVelocity(policies, rollout), RoundKey(seed, 0)
    before = likelihood(objective, velocity, rollout, advantage, seed)
    (units,) = objective.units(rollout, advantage, key=key)
    optimizer = torch.optim.AdamW(policies.parameters(), lr=RATE, weight_decay=0.0)
    for part in units.split(8):
        output = objective(velocity, rollout, part, old_is_current=True)
        (output.loss.sum() / units.count).backward()
    optimizer.step()
    optimizer.zero_grad()
    change = likelihood(objective, velocity, rollout, advantage, seed) - before
    return float(torch.nn.functional.cosine_similarity(advantage.double(), change, dim=0))


def roll_out(world: World, objective: Objective, seed: int) -> Rollout:
    """Record a rollout as the objective wants it."""
    editor, how = world.editor, objective.sampling(0, steps=STEPS)
    batch, makes = GROUPS * MEMBERS, world.editor.family.references == "none"
    pictures = [None if makes else picture(64, seed=g) for g in range(GROUPS)]
    if editor.family.name == "kontext":
        side = int(editor.pipeline.vae.config.sample_size)
        pictures = [image and image.resize((side, side)) for image in pictures]
    with world.policies.use(objective.samples_with):
        parts = editor.roll_out(
            [pictures[b // MEMBERS] for b in range(batch)],
            [[PROMPTS[(b // MEMBERS + n) % 3] for n in range(world.turns)] for b in range(batch)],
            generators=trajectory_generators(seed, batch),
            group=torch.arange(batch) // MEMBERS,
            batch=batch,
            solver=how.solver,
            stochastic_steps=how.stochastic_steps,
        )
        return Rollout.concatenate([part.rollout for part in parts])


@torch.no_grad()
def likelihood(
    objective: Objective, velocity: Any, rollout: Rollout, advantage: Tensor, seed: int
) -> Tensor:
    """Mean log-prob of each trajectory's steps, or minus its flow-matching loss, float64 [B]."""
    if hasattr(objective, "replay"):
        (units,) = objective.units(rollout, advantage, key=RoundKey(seed, 0))
        found = objective.replay(velocity, rollout, units, old_is_current=True).log_prob
    else:
        judged = NFT(renoise=LEVELS)
        (units,) = judged.units(rollout, advantage, key=RoundKey(seed + 10**6, 0))
        states = renoise(rollout, units, LEVELS)
        made = velocity("current", states.x_t, states.sigma, units.rows[:, 0, :2])
        found = -(made - states.target).square().flatten(1).mean(dim=1)
    total = torch.zeros(len(rollout), dtype=torch.float64)
    total.index_add_(0, units.rows[:, 0, 0], found.double().cpu())
    return total / torch.bincount(units.rows[:, 0, 0], minlength=len(rollout))


def run(families: Iterable[str]) -> dict[str, dict[str, list[float]]]:
    """Cosines of every family and objective, one per seed."""
    small_pictures()
    found: dict[str, dict[str, list[float]]] = {}
    for family in families:
        with tempfile.TemporaryDirectory() as folder:
            world = make_world(family, Path(folder))
            found[family] = {
                name: [cell(world, objective, seed) for seed in range(SEEDS)]
                for name, objective in OBJECTIVES.items()
            }
        cells = ", ".join(f"{name} {interval(x):+.2f}" for name, x in found[family].items())
        sys.stdout.write(f"{family}: {cells}\n")
        sys.stdout.flush()
    return found


def interval(values: list[float]) -> SeedInterval:
    """Mean over seeds with its t-interval."""
    return mean_interval(torch.tensor(values, dtype=torch.float64))


def page(found: Mapping[str, Mapping[str, list[float]]]) -> str:
    """Render the page as Markdown."""
    names = list(OBJECTIVES)
    text = INTRODUCTION.format(
        torch=torch.__version__,
        diffusers=diffusers.__version__,
        transformers=transformers.__version__,
        rate=RATE,
        groups=GROUPS,
        members=MEMBERS,
        steps=STEPS,
        seeds=SEEDS,
        columns="".join(f" {name} |" for name in names),
        rule="--:|" * len(names),
    )
    for family, cells in found.items():
        numbers = "".join(f" {interval(cells[name]):+.2f} |" for name in names)
        text += f"| {family} | {PRESETS[family]} |{numbers}\n"
    return text


def main() -> int:
    """Run every cell, and write the page and its facts."""
    argparse.ArgumentParser(prog="python -m docs.render_presets", description=__doc__).parse_args()
    warnings.filterwarnings("ignore")  # of tiny tokenizers and configurations
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    found = run(PRESETS)
    PAGE.write_text(page(found), encoding="utf-8")
    PAGE.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    wrong = [
        f"{family}, {name}: {interval(values):+.2f}"
        for family, cells in found.items()
        for name, values in cells.items()
        if interval(values).verdict != "seen"
    ]
    sys.stdout.write("\n".join(wrong or [f"{PAGE}: every interval lies above 0"]) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
