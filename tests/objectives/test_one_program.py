"""One loop, every objective: on the core alone, and on a diffusers pipeline."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from one_program import OBJECTIVES, train

import mteditflow as mt
from mteditflow.objectives import AWM, DPO, DPPO, GRPO, NFT, Distillation, Guard, Renoise
from mteditflow.objectives import OBJECTIVES as TABLE

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def gains(tmp_path_factory):
    """What the program prints where nothing but the core's own dependencies can be imported."""
    folder = tmp_path_factory.mktemp("core")
    program = ROOT / "tests" / "objectives" / "one_program.py"
    finished = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "core_alone.py"), str(folder), str(program)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    found, packages = map(json.loads, finished.stdout.splitlines()[-2:])
    assert {"torch", "mteditflow"} <= set(packages["present"])
    assert set(packages["loaded"]) <= set(packages["present"])
    return found


def test_the_program_runs_objectives_of_the_table():
    assert len(OBJECTIVES) >= 7
    assert {name: type(own) for name, own in OBJECTIVES.items()}.items() <= TABLE.items()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_rewards_of_fresh_samples_rise_on_the_core_alone(gains, name):
    """From about -3, after 20 updates; 4 standard errors of the paired gain."""
    gain, error = gains[name]
    assert gain - 4 * error > 0.5


def test_a_policy_does_not_rise_where_rewards_are_noise():
    """The test above measures learning: advantages without a meaning move nothing by as much."""
    from one_program import Points

    world = Points()
    random = torch.Generator().manual_seed(0)
    before, world.seed = world.fresh_rewards(), 0
    reward, world.reward = world.reward, lambda samples: torch.rand(64, generator=random)
    parameters = world.policies["current"].parameters()
    train(OBJECTIVES["nft"], world, torch.optim.Adam(parameters, lr=1e-2), rounds=5)
    world.reward = reward
    assert float((world.fresh_rewards() - before).mean()) < 0.3


# diffusers


class Editor:
    """A tiny Kontext pipeline that edits chains of two turns; its reward is how red images are."""

    steps = 3

    def __init__(self):
        from mteditflow_examples.shapes.editor import build_kontext
        from mteditflow_examples.shapes.world import draw, make_chains
        from peft import LoraConfig

        from mteditflow.pipelines import LoraPolicies

        self.pipeline = build_kontext()
        targets = ["to_q", "to_k", "to_v", "to_out.0", "proj_out"]
        config = LoraConfig(r=8, lora_alpha=16, target_modules=targets)
        self.policies = LoraPolicies(self.pipeline.transformer, config)
        chains = make_chains(2, turns=2, seed=0, split="train") * 4
        self.group = torch.arange(8) % 2
        self.images = torch.stack([draw(chain.initial) for chain in chains])
        self.prompts = [chain.instructions for chain in chains]
        self.seed = 0

    def sample(self, policy, sampling):
        from mteditflow_examples.shapes.editor import call_options

        from mteditflow.pipelines import Recorder

        self.seed += 8
        generators, images = mt.trajectory_generators(self.seed, 8), self.images
        steps = sampling.stochastic_steps
        with (
            self.policies.use(policy),
            Recorder(
                self.pipeline, sampling.solver, generators=generators, stochastic_steps=steps
            ) as recorder,
        ):
            for turn in zip(*self.prompts, strict=True):
                images = self.pipeline(
                    images,
                    list(turn),
                    generator=generators,
                    **call_options(self.pipeline, steps=self.steps),
                ).images
        return recorder.rollout(group=self.group.tolist())

    def reward(self, samples):
        latents = samples.trajectory.clean.float()
        return latents.flatten(2)[:, :, ::4].mean(dim=(1, 2))

    def velocity(self, samples):
        from mteditflow.pipelines import RolloutVelocity

        def at(policy, x_t, sigma, at):
            if policy == "teacher":  # the base model, with a drift that the reward likes
                return policies("reference", x_t, sigma, at) - self.drift(x_t)
            return policies(policy, x_t, sigma, at)

        policies = RolloutVelocity(self.policies, samples)
        return at

    @staticmethod
    def drift(x_t):
        liked = torch.zeros_like(x_t).flatten(1)
        liked[:, ::4] = 0.5
        return liked.view(x_t.shape)

    def update_old(self, decay):
        self.policies.update_old(decay=decay)

    def fresh_rewards(self):
        self.seed = 10**6
        sampling = NFT().sampling(0, steps=self.steps)
        return self.reward(self.sample("current", sampling))


REPLAYS = {"stochastic_steps": 2, "noise_level": 0.7}
WIDE = {"clip_low": 0.01, "clip_high": 0.01}
FORWARD = {"renoise": Renoise(levels=2)}


PIPELINE_OBJECTIVES = {
    "nft": NFT(**FORWARD),
    "grpo": GRPO(**WIDE, **REPLAYS),
    "awm": AWM(**WIDE, **FORWARD),
    "dpo": DPO(dpo_beta=100.0, **FORWARD),
    "guard": Guard(**WIDE, **REPLAYS),
    "dppo": DPPO(threshold=1e-3, **REPLAYS),
    "distillation": Distillation(share=0.7),
}


# Forward, replay, pairs and a teacher differ in what they ask of the pipeline; the others do not.
MARKS = dict.fromkeys(("dpo", "distillation"), pytest.mark.slow) | dict.fromkeys(
    ("awm", "guard", "dppo"), pytest.mark.long
)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=MARKS.get(name, ())) for name in PIPELINE_OBJECTIVES],
)
def test_the_same_loop_trains_a_diffusers_pipeline(name):
    pytest.importorskip("diffusers")
    world = Editor()
    before, world.seed = world.fresh_rewards(), 0
    optimizer = torch.optim.Adam(world.policies.parameters(), lr=3e-3)
    train(PIPELINE_OBJECTIVES[name], world, optimizer, rounds=4)
    gains = world.fresh_rewards() - before
    assert float(gains.mean()) > 4 * float(gains.std()) / len(gains) ** 0.5
