"""Memory of phases, verdicts, FLOPs, least time and advice, by hand."""

from dataclasses import replace

import pytest
import torch

from mteditflow.budget import (
    MODELS,
    Budget,
    Costs,
    ModelCosts,
    Passes,
    Plan,
    alternatives,
    case_of,
    costs_of,
    count_passes,
    least_hours,
    peak,
    phases,
    verdict,
    work,
)
from mteditflow.budget.advice import spared
from mteditflow.budget.costs import EncoderCosts, VaeCosts
from mteditflow.budget.plan import usable
from mteditflow.objectives import DPO, GRPO, NFT
from tests.loops import some

GIB = 2**30
G = 10**9
ROW = Costs(
    weights=10 * G, linear=9 * G, buffers=0, largest=0, block=G, adapters=G // 10,
    forward=100, train=320, train_plain=220, update=2 * GIB, update_plain=20 * GIB,
    sample=GIB // 2,
)  # fmt: skip
COSTS = ModelCosts(ROW, VaeCosts(0, GIB, GIB // 4, GIB // 8), EncoderCosts(5 * G, 5 * G, GIB // 4))
PLAN = Plan(COSTS, Passes(3, 3, 3, 1))
EVERY = (
    "model.quantize", "model.encoders", "model.vae_slicing", "model.checkpointing",
    "training.batch", "sampling.batch", "evaluation.batch", "training.optimizer", "model.shard",
)  # fmt: skip


def totals(plan):
    return {x.name: x.total / GIB for x in phases(plan)}


def test_memory_does_not_depend_on_the_number_of_turns():
    """Measured in tests/pipelines/test_memory_of_turns.py; FLOPs and hours grow with them."""
    longer = replace(PLAN, turns=4 * PLAN.turns)
    assert phases(longer) == phases(PLAN)
    assert work(longer).sampling == 4 * work(PLAN).sampling


def test_memory_of_every_phase():
    weights, resting = (
        20 * G / GIB,
        20 * G / 10 / GIB,
    )  # 4 + 4 + 4 + 8 bytes for an adapter's weight
    assert totals(PLAN) == pytest.approx(
        {
            "text encoders": weights + resting + 10 * G / GIB + 0.25,
            "sampling": weights + resting + 8 * 0.5,
            "sampling, VAE": weights + resting + 8 * 1.2,
            "update": weights + 24 * G / 10 / GIB + 4 * 2,
            "evaluation": weights + resting + 8 * 0.5,
            "evaluation, VAE": weights + resting + 8 * 1.2,
        }
    )


def test_options_lower_their_phase():
    assert totals(replace(PLAN, encoders="host"))["text encoders"] == pytest.approx(22 * G / GIB)
    ahead = phases(replace(PLAN, encoders="ahead"))[0]
    assert (ahead.weights, ahead.adapters, ahead.activations) == (10 * G, 0, GIB // 4)
    assert totals(replace(PLAN, vae_slicing=True))["sampling, VAE"] == pytest.approx(
        22 * G / GIB + 1.2
    )
    assert totals(replace(PLAN, vae_tiling=True))["evaluation, VAE"] == pytest.approx(
        22 * G / GIB + 8 * 1.2 / 4
    )
    one = totals(replace(PLAN, one_by_one=True))
    assert one["sampling"] == pytest.approx(22 * G / GIB + 0.5)
    pairs = replace(PLAN, passes=Passes(3, 0, 3, 2))
    assert totals(pairs)["update"] - totals(PLAN)["update"] == pytest.approx(8)
    plain = totals(replace(PLAN, checkpointing=False))["update"]
    assert plain - totals(PLAN)["update"] == pytest.approx(4 * 18)
    lean = totals(replace(PLAN, average=False, optimizer_bytes=2))["update"]
    assert totals(PLAN)["update"] - lean == pytest.approx((4 + 6) * G / 10 / GIB)
    frozen = totals(replace(PLAN, more_adapters=1))["update"]
    assert frozen - totals(PLAN)["update"] == pytest.approx(4 * G / 10 / GIB)


def test_quantized_weights():
    # 0.5 bytes and a float32 scale for 64 weights; layers that are not linear stay in bf16
    packed = {"nf4": 0.5625 * 9 * G + 2 * G, "int8": 1.001 * 9 * G + 2 * G}
    for name, size in some(packed.items()):
        plan = replace(PLAN, quantize=name, encoders="host")
        assert next(iter(phases(plan))).weights == pytest.approx(size)


def test_files_of_flux_quantized_by_bitsandbytes():
    model = MODELS["kontext"]
    case = case_of(model, model.behavior.shape(512), rank=32, branches=1)
    plan = Plan(costs_of(model, case), PLAN.passes, encoders="host")
    vae = 2 * plan.costs.vae.weights
    for name, published in some({"nf4": 6.70, "int8": 11.92}.items()):  # GB
        weights = phases(replace(plan, quantize=name))[0].weights - vae
        # the file has embedders and head packed, too
        assert weights / G == pytest.approx(published, rel=0.015)


def test_shards():
    spread = replace(PLAN, gpus=4, shard="fsdp2")
    block = 2 * 2 * G / GIB  # the gathered one and the next
    assert totals(spread)["update"] == pytest.approx((20 * G + 24 * G / 10) / 4 / GIB + 8 + block)
    zero3 = totals(replace(PLAN, gpus=4, shard="zero3"))["update"]
    assert zero3 == pytest.approx((20 * G / 4 + 24 * G / 10) / GIB + 8 + block)
    assert totals(replace(PLAN, gpus=4)) == totals(PLAN)


def test_verdicts():
    assert usable(24) == pytest.approx((24 - 0.6) * 0.95 * GIB)
    need = peak(PLAN).total
    card = need / GIB / 0.95 + 0.6  # takes the run to the last byte
    assert verdict(PLAN, card * 1.0001) == "tight"
    assert verdict(PLAN, card * 0.999) == "no"
    assert verdict(PLAN, (card - 0.6) / 0.9 + 0.61) == "fits"
    assert verdict(PLAN, (card - 0.6) / 0.9 + 0.59) == "tight"
    with pytest.raises(ValueError, match="memory: expected a finite number"):
        usable(0.5)
    with pytest.raises(ValueError, match="training_batch: expected"):
        replace(PLAN, training_batch=0)


def test_work_of_a_trajectory():
    # sampling 3 turns of 6 steps; the update 3 rows of 3.2 F and 6 of 1 F
    assert work(PLAN).in_forwards == pytest.approx(18 + 3 * 3.2 + 6)
    assert work(replace(PLAN, branches=2)).total == 2 * work(PLAN).total
    assert work(replace(PLAN, checkpointing=False)).in_forwards == pytest.approx(18 + 6.6 + 6)
    # 33.6 * 100 FLOPs of 128 trajectories in 50 rounds, at 1e-9 TFLOP/s, by half, on two GPUs
    hours = least_hours(replace(PLAN, gpus=2), 1e-9, efficiency=0.5, rounds=50)
    assert hours == pytest.approx(3360 * 128 * 50 / (1000 * 0.5 * 2) / 3600)
    with pytest.raises(ValueError, match="efficiency: expected"):
        least_hours(PLAN, 1.0, efficiency=0.0)


def test_passes_of_objectives():
    def count(objective, **given):
        numbers = {"turns": 3, "steps": 6, "group_size": 16, "round": 600}
        return count_passes(objective, **{**numbers, **given})

    assert count(NFT(kl_coef=1e-4)) == Passes(3, 3, 3, 1)
    assert count(NFT(kl_coef=1e-4), round=0) == Passes(3, 0, 3, 1)  # the old policy is current
    assert count(NFT(kl_coef=0.0, old_slope=0.0)) == Passes(3, 0, 0, 1)
    assert count(NFT(kl_coef=0.0, old_slope=0.0), minibatches=2) == Passes(3, 1.5, 0, 1)
    assert count(GRPO(stochastic_steps=5), minibatches=2) == Passes(15, 0, 0, 1)
    assert count(GRPO(stochastic_steps=5, share=0.5, kl_coef=0.1)) == Passes(9, 0, 9, 1)
    assert count(NFT(kl_coef=0.0), epochs=2, turns=2) == Passes(4, 4, 0, 1)
    assert count(NFT(kl_coef=1e-4, kl_share=0.25)) == Passes(3, 3, 0.75, 1)
    assert count(DPO()) == Passes(0.375, 0, 0.375, 2)  # one pair of a group of 16 at each turn
    with pytest.raises(ValueError, match="stochastic_steps: expected at most"):
        count(GRPO(stochastic_steps=5), steps=4)


def test_advice_takes_the_fewest_changes():
    assert [x.changed for x in alternatives(PLAN, 48, options=EVERY)] == [
        {},
        {"model.quantize": "int8"},
        {"model.quantize": "nf4"},
    ]
    bf16, int8, nf4 = alternatives(PLAN, 28, options=EVERY)
    assert verdict(PLAN, 28) == "no"
    # 22 GB of weights and adapters at rest, of 26.0 GiB: encoders away, one image, one row
    assert bf16.verdict == "fits"
    assert bf16.changed == {
        "model.encoders": "host", "model.vae_slicing": "true", "training.batch": "1",
        "sampling.batch": "4", "evaluation.batch": "4",
    }  # fmt: skip
    assert int8.verdict == nf4.verdict == "fits"
    assert int8.changed == {"model.quantize": "int8"}
    assert nf4.changed == {"model.quantize": "nf4"}
    for found in some((bf16, int8, nf4)):
        assert verdict(found.plan, 28) == found.verdict


def test_encoders_work_ahead_where_they_read_no_images():
    options = ("model.prompt_folder", "model.encoders")
    plan = replace(PLAN, vae_slicing=True)  # else its decoding is the peak, too
    (found,) = alternatives(plan, 35, options=options)
    assert (found.verdict, found.changed) == ("fits", {"model.prompt_folder": "DIR"})
    (found,) = alternatives(replace(plan, reads_images=True), 35, options=options)
    assert (found.verdict, found.changed) == ("fits", {"model.encoders": "host"})


def test_options_that_the_trainer_refuses_together_are_not_advised():
    packed = replace(PLAN, gpus=8, quantize="nf4")
    for found in some(alternatives(packed, 9, options=EVERY)):
        assert "model.shard" not in found.changed or found.plan.quantize == "none"
    sharded = replace(PLAN, gpus=8, shard="fsdp2")
    (only,) = alternatives(sharded, 6, options=EVERY)
    assert not {"model.quantize", "training.optimizer"} & only.changed.keys()


def test_only_options_that_the_trainer_has_are_advised():
    for options in some(((), ("training.batch",), ("training.batch", "sampling.batch"))):
        (only,) = alternatives(PLAN, 28, options=options)
        assert set(only.changed) <= set(options)
        assert only.verdict == "no"
    assert not Budget("run", PLAN, 28, options=()).feasible
    assert Budget("run", PLAN, 28, options=EVERY).feasible


def test_kept_blocks_lie_between_checkpointing_and_none():
    plan = replace(PLAN, blocks=9)
    for kept in range(10):
        own = replace(plan, kept_blocks=kept)
        assert totals(own)["update"] - totals(PLAN)["update"] == pytest.approx(4 * 18 * kept / 9)
        assert work(own).update == pytest.approx(3 * (320 - 100 * kept / 9) + 600)
    assert totals(replace(plan, kept_blocks=9)) == totals(replace(plan, checkpointing=False))
    found = spared(replace(plan, kept_blocks=1), 60)
    assert verdict(found, 60) == "fits"
    assert verdict(replace(plan, kept_blocks=found.kept_blocks + 1), 60) != "fits"
    assert spared(replace(plan, kept_blocks=found.kept_blocks), 60) is None
    for wrong in some([{"kept_blocks": 10}, {"kept_blocks": 1, "checkpointing": False}]):
        with pytest.raises(ValueError, match="kept_blocks: expected at most the 9 blocks"):
            replace(plan, **wrong)


def test_nothing_fits_a_card_too_small():
    for found in some(alternatives(PLAN, 4, options=EVERY)):
        assert found.verdict == "no"
    shards = alternatives(replace(PLAN, gpus=16), 12, options=EVERY)
    assert shards[0].changed["model.shard"] == "fsdp2"
    assert shards[0].verdict != "no"


def test_the_report_in_words():
    lines = Budget("mine", PLAN, 28, options=EVERY).lines()
    assert any(x.endswith("without evaluations and the judge:") for x in lines)
    for rounds in (100, PLAN.rounds):  # of the run, too
        (hours,) = [x for x in lines if x.startswith(f"  {rounds} rounds: H100/H200 ")]
        assert f" {Budget('mine', PLAN, 28).hours(rounds)['A100']:.3g}," in hours
    assert lines[0].startswith("mine on 1 GPU of 28 GiB: no as configured (predicted")
    fitting = lines[lines.index("It fits only with changes:") + 1 :]
    verdicts = [x.split()[0] for x in fitting if x[2:5].strip() and x.startswith("  ")]
    assert verdicts[0] != "no"
    assert max(map(len, lines)) <= 100
    assert "Nothing fits; the smallest that the options allow:" in Budget("mine", PLAN, 4).lines()
    spare = Budget("mine", PLAN, 141, options=EVERY).lines()
    assert any("model.checkpointing false, which saves 3.0 F" in x for x in spare)
    assert "  F" not in spare


def test_the_report_as_json():
    values = Budget("mine", replace(PLAN, rounds=200), 28, options=EVERY).as_json()
    assert (values["predicted"], values["verdict"], values["feasible"]) == (True, "no", True)
    assert values["phases"][0] == {
        "name": "text encoders", "weights": 27.94, "adapters": 1.86, "activations": 0.25,
        "total": 30.05,
    }  # fmt: skip
    assert values["flops"]["forwards"] == pytest.approx(33.6)
    hours = values["least_hours_per_100_rounds"]["A100"], values["least_hours"]["A100"]
    assert hours == (0.0, 0.0)  # 100 FLOPs a forward pass


def test_float32_weights_take_twice_as_much():
    wide = phases(replace(PLAN, dtype=torch.float32))[3]
    assert wide.weights == 2 * phases(PLAN)[3].weights
