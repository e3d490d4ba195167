"""The pipelines of docs/support.md: recorded, replayed, trained, and left as they were.

``python -m docs.render_support`` runs these tests and writes the page from what they report.
"""

import re
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, REFUSED
from peft import LoraConfig
from tiny import replay

import mteditflow as mt
from mteditflow.pipelines import LoraPolicies, Recorder, Rollout

PAGE = Path(__file__).parents[2] / "docs" / "support.md"
CASES = [(name, kind) for name, family in FAMILIES.items() for kind in family.guided]
SOLVER = mt.FlowSDE(0.7)
STEPS = TURNS = 2


@dataclass
class Case:
    """One pipeline with one kind of guidance, rolled out once for all tests."""

    name: str
    kind: str
    pipeline: Any

    def call(self, turn, generators, output_type="pt"):
        """What the pipeline makes of a turn's inputs, as a tensor."""
        family = FAMILIES[self.name]
        given = family.inputs(turn) | family.options | family.guided[self.kind]
        given |= {"num_inference_steps": STEPS, "output_type": output_type}
        own = deepcopy(given)  # Z-Image writes its chat template into the lists that it is given
        return self.pipeline(**own, generator=generators)[0]

    @cached_property
    def rollout(self) -> Rollout:
        generators = mt.trajectory_generators(0, 2)
        calls = []
        hook = self.pipeline.transformer.register_forward_hook(lambda *_: calls.append(1))
        with Recorder(self.pipeline, SOLVER, generators=generators) as recorder:
            for turn in range(TURNS):
                self.call(turn, generators, "latent")
        hook.remove()
        self.calls = len(calls) // (STEPS * TURNS)  # one more verifies
        return recorder.rollout(group=[0, 1])

    @cached_property
    def policies(self):
        """Adapters that start as no-ops, on all attention layers."""
        config = LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"])
        return LoraPolicies(self.pipeline.transformer, config)

    def log_prob(self, rows):
        """Log-probs of stored steps, with gradients."""
        return replay(self.rollout, self.pipeline.transformer, SOLVER, rows)

    def deviation(self, batches):
        """How far ratios of stored steps are from 1 at most."""
        old = self.rollout.trajectory.log_prob
        with torch.no_grad():
            ratios = torch.cat([(self.log_prob(rows) - old[rows]).exp() for rows in batches])
        return (ratios - 1).abs().max().item()

    def losses(self, loss):
        """Loss before and after three steps of the optimiser on the same rows."""
        self.policies.load_state_dict(self.policies.state_dict("old"))
        optimizer = torch.optim.Adam(self.policies.parameters(), lr=0.02)
        values = []
        for _ in range(4):
            optimizer.zero_grad()
            value = loss()
            value.backward()
            optimizer.step()
            values.append(value.item())
        self.policies.load_state_dict(self.policies.state_dict("old"))  # other tests look, too
        return values[0], values[-1]

    def facts(self):
        """The table's columns that the rollout alone tells."""
        place = self.rollout.conditioning[0].stages[0].calls[0].place
        return {
            "calls per step": str(self.calls),
            "how the sample lies": str(place),
            "text": FAMILIES[self.name].text,
        }


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def case(request):
    name, kind = request.param
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Case(name, kind, FAMILIES[name].build())


def test_a_fresh_rollout_has_ratio_one_at_every_step(case, record_property):
    trajectory = case.rollout.trajectory
    assert trajectory.stochastic.all()
    rows = torch.stack(trajectory.step_mask.nonzero(as_tuple=True))
    as_sampled = [tuple(rows[:, (rows[1] == n) & (rows[2] == s)]) for n in (0, 1) for s in (0, 1)]
    shuffled = rows[:, torch.randperm(8, generator=torch.Generator().manual_seed(0))]
    mixed = [tuple(part) for part in shuffled.split((5, 3), dim=1)]
    assert case.deviation(as_sampled) == 0
    assert case.deviation(mixed) <= 1e-6
    for column, value in case.facts().items():
        record_property(column, value)
    record_property("ratio", "1; mixed: 1 to 1e-6")


def test_grpo_lowers_its_loss(case, record_property):
    trajectory = case.rollout.trajectory
    rows = trajectory.step_mask.nonzero(as_tuple=True)
    advantage = torch.tensor([1.0, -1.0])[rows[0]]

    def loss():
        log_prob, old = case.log_prob(rows), trajectory.log_prob[rows]
        return mt.clipped_surrogate_loss(
            log_prob, old, advantage, clip_low=0.2, clip_high=0.2
        ).mean()

    before, after = case.losses(loss)
    assert abs(before) < 1e-6
    assert after < before - 1e-5
    record_property("GRPO", "loss falls")


def test_nft_lowers_its_loss(case, record_property):
    trajectory, turn = case.rollout.trajectory.turn_mask.nonzero(as_tuple=True)
    clean = case.rollout.trajectory.clean[trajectory, turn]
    generator = torch.Generator().manual_seed(1)
    noise, sigma = torch.randn(clean.shape, generator=generator), torch.tensor([0.3, 0.5, 0.7, 0.9])
    model, x_t = case.pipeline.transformer, mt.interpolate(clean, noise, sigma)
    target, r = mt.velocity_target(clean, noise), torch.tensor([1.0, 0.0])[trajectory]

    def velocity():
        return case.rollout.velocity(model, x_t, sigma, trajectory, turn)

    def loss():
        current = velocity()
        old = case.policies.old_velocity(current, velocity)
        return mt.nft_loss(current, old, target, r, nft_beta=1.0).mean()

    before, after = case.losses(loss)
    assert after < before * (1 - 1e-5)
    record_property("NFT", "loss falls")


def test_under_an_ode_it_is_the_pipeline_bit_for_bit(case, record_property):
    scheduler = case.pipeline.scheduler
    plain = case.call(0, mt.trajectory_generators(0, 2))
    with Recorder(case.pipeline):
        recorded = case.call(0, mt.trajectory_generators(0, 2))
    assert torch.equal(recorded, plain)
    assert case.pipeline.scheduler is scheduler
    assert not case.pipeline.transformer._forward_hooks
    record_property("output under an ODE", "the pipeline's own bits")


def test_page_tells_what_was_seen(case):
    (row,) = [row for row in table(0) if row[:2] == [f"`{case.name}`", case.kind]]
    assert row[2:5] == list(case.facts().values())


# What is refused.


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_says_why(what, record_property):
    refused = REFUSED[what]
    pipeline = refused.build()
    scheduler = pipeline.scheduler
    with pytest.raises(ValueError, match=re.escape(refused.reason)) as caught, Recorder(pipeline):
        pipeline(**refused.options, num_inference_steps=4)
    assert pipeline.scheduler is scheduler
    assert not pipeline.transformer._forward_hooks
    record_property("error", str(caught.value))


def table(number):
    """Cells of the rows of a table of the page."""
    tables = re.findall(r"(?:^\|.*\n)+", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    rows = [line.strip("| \n").split(" | ") for line in tables[number].splitlines()]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def test_page_has_a_row_for_every_case():
    assert [tuple(row[:2]) for row in table(0)] == [(f"`{name}`", kind) for name, kind in CASES]
    assert [row[0] for row in table(1)] == list(REFUSED)
