"""Recorder and Rollout: what a pipeline did, again, with gradients, or a clear refusal."""

import dataclasses
import gc
import weakref

import pytest
import torch
from diffusers import FluxKontextPipeline, FluxTransformer2DModel
from tiny import CHAIN, STEPS, batches_of_rollout, call, options, picture, roll_out
from tiny_pipelines.checks import replay

from mteditflow import (
    CPS,
    DanceSDE,
    FlowSDE,
    check_ratio,
    clipped_surrogate_loss,
    interpolate,
    nft_loss,
    trajectory_generators,
    velocity_target,
)
from mteditflow.pipelines import Recorder, ReplayError, Rollout
from mteditflow.pipelines.guidance import Guidance
from mteditflow.testing import check_replay
from tests.loops import some

SOLVERS = [FlowSDE(0.7), DanceSDE(0.3), CPS(0.6)]


def is_kontext(pipeline):
    return isinstance(pipeline, FluxKontextPipeline)


def all_rows(rollout):
    return rollout.trajectory.step_mask.nonzero(as_tuple=True)


# Fidelity: the replay is the rollout.


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("solver", SOLVERS)
def test_ratio_is_one_at_every_step_of_a_fresh_rollout(pipeline, solver, guidance):
    rollout = roll_out(pipeline, solver, guidance=guidance)
    replayed = torch.zeros_like(rollout.trajectory.log_prob)
    for rows in batches_of_rollout(rollout, together=is_kontext(pipeline)):
        replayed[rows] = replay(rollout, pipeline.transformer, solver, rows).detach()
    ratio = (replayed - rollout.trajectory.log_prob).exp()
    assert (ratio - 1).abs().max() <= 1e-6
    rows, model = all_rows(rollout), pipeline.transformer
    old_log_prob = rollout.trajectory.log_prob[rows]
    check_replay(lambda: replay(rollout, model, solver, rows), old_log_prob)
    verdict = check_ratio(
        replayed, rollout.trajectory.log_prob, clip=1e-4, valid=rollout.trajectory.step_mask
    )
    assert verdict.ok, verdict.verdict


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_replay_is_bit_for_bit_what_the_scheduler_was_given(pipeline, guidance):
    given = []
    stepped = Recorder.stepped

    def keep(self, step, velocity, timestep):
        given.append(velocity)
        stepped(self, step, velocity, timestep)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "stepped", keep)
        rollout = roll_out(pipeline, FlowSDE(0.7), guidance=guidance)
    batches = list(batches_of_rollout(rollout, together=is_kontext(pipeline)))
    for rows, velocity in some(zip(batches, given, strict=True)):
        steps = rollout.trajectory.steps(*rows)
        again = rollout.velocity(pipeline.transformer, steps.x_t, steps.sigma, *rows[:2])
        torch.testing.assert_close(again, velocity, rtol=0, atol=1e-6)


def test_both_branches_and_their_scale_are_recovered(pipeline):
    for guidance in (1.7, 4.0):
        recipe = roll_out(pipeline, turns=1, guidance=guidance).conditioning[0].stages[0].recipe
        assert recipe.guidance == Guidance(0, guidance)
    assert roll_out(pipeline, turns=1).conditioning[0].stages[0].recipe.guidance is None


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_rows_of_different_trajectories_turns_and_steps_share_a_batch(pipeline, guidance):
    solver = FlowSDE(0.7)
    rollout = roll_out(pipeline, solver, batch=3, guidance=guidance)
    rows = all_rows(rollout)
    shuffled = [index[torch.randperm(len(rows[0]))[:7]] for index in rows]
    calls = count_calls(pipeline.transformer)
    together = replay(rollout, pipeline.transformer, solver, shuffled)
    assert calls() == (1 if guidance == 1 else 2)
    one_by_one = torch.cat(
        [
            replay(rollout, pipeline.transformer, solver, [index[k : k + 1] for index in shuffled])
            for k in range(7)
        ]
    )
    torch.testing.assert_close(together, one_by_one, rtol=0, atol=1e-6)
    stored = rollout.trajectory.log_prob[tuple(shuffled)]
    torch.testing.assert_close(together.detach(), stored, rtol=0, atol=1e-6)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_gradients_of_a_mixed_batch_are_the_sum_of_single_ones(pipeline, guidance):
    solver = DanceSDE(0.3)
    rollout = roll_out(pipeline, solver, guidance=guidance)
    rows = [index[::3] for index in all_rows(rollout)]
    weight = torch.linspace(-1, 1, len(rows[0]))
    parameters = list(pipeline.transformer.parameters())

    def gradients(of):
        log_prob = replay(rollout, pipeline.transformer, solver, [index[of] for index in rows])
        return torch.autograd.grad((weight[of] * log_prob).sum(), parameters)

    together = gradients(slice(None))
    singles = [gradients(slice(k, k + 1)) for k in range(len(weight))]
    assert sum(float(g.abs().sum()) for g in together) > 0
    for position, ours in some(enumerate(together)):
        theirs = sum(single[position] for single in singles)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_on_policy_gradient_of_the_clipped_surrogate_is_minus_the_advantage(kontext):
    solver = FlowSDE(0.7)
    rollout = roll_out(kontext, solver, batch=3)
    rows = all_rows(rollout)
    log_prob = replay(rollout, kontext.transformer, solver, rows)
    advantage = torch.tensor([1.0, -2.0, 0.5])[rows[0]]
    stored = rollout.trajectory.log_prob[rows]
    loss = clipped_surrogate_loss(log_prob, stored, advantage, clip_low=1e-4, clip_high=1e-4)
    (gradient,) = torch.autograd.grad(loss.sum(), log_prob, retain_graph=True)
    torch.testing.assert_close(gradient, -advantage, rtol=1e-5, atol=1e-5)
    loss.mean().backward()
    assert all(p.grad is not None for p in some(kontext.transformer.proj_out.parameters()))


def test_renoises_the_clean_latent_at_any_sigma_for_nft(pipeline):
    rollout = roll_out(pipeline, batch=2)
    trajectory, turn = torch.tensor([0, 1, 1]), torch.tensor([1, 0, 1])
    clean = rollout.trajectory.clean[trajectory, turn]
    sigma = torch.tensor([0.137, 0.9999, 0.5])
    noise = torch.randn(clean.shape)
    x_t = interpolate(clean, noise, sigma)
    velocity = rollout.velocity(pipeline.transformer, x_t, sigma, trajectory, turn)
    expected = torch.cat(
        [direct_call(rollout, pipeline, x_t[k], sigma[k], trajectory[k], turn[k]) for k in range(3)]
    )
    torch.testing.assert_close(velocity, expected, rtol=0, atol=1e-6)
    target = velocity_target(clean, noise)
    r = torch.tensor([1.0, 0.5, 0.0])
    loss = nft_loss(velocity, velocity.detach(), target, r, nft_beta=1.0)
    loss.sum().backward()
    assert pipeline.transformer.proj_out.weight.grad.abs().sum() > 0


def direct_call(rollout, pipeline, x_t, sigma, trajectory, turn):
    """The transformer as the pipeline calls it, written out from the record by hand."""
    call, row = rollout.index[trajectory, turn].tolist()
    branch = rollout.conditioning[call].stages[0].calls[0]
    known = branch.arguments
    arguments = {
        "hidden_states": torch.cat([x_t[None], branch.rest.tensor[row : row + 1]], dim=1),
        "timestep": sigma[None],
        "encoder_hidden_states": known["encoder_hidden_states"].tensor[row : row + 1],
        "return_dict": False,
    }
    if is_kontext(pipeline):
        arguments |= {name: known[name] for name in ("txt_ids", "img_ids")}
        arguments["pooled_projections"] = known["pooled_projections"].tensor[row : row + 1]
    else:
        for name in ("txt_ids", "img_ids"):
            arguments[name] = known[name].tensor[row : row + 1]
    return pipeline.transformer(**arguments)[0][:, : len(x_t)]


def test_another_policy_has_another_ratio(pipeline):
    solver = FlowSDE(0.7)
    rollout = roll_out(pipeline, solver)
    with torch.no_grad():
        pipeline.transformer.proj_out.weight.mul_(1.1)
    rows = all_rows(rollout)
    replayed = replay(rollout, pipeline.transformer, solver, rows).detach()
    deviation = (replayed - rollout.trajectory.log_prob[rows]).exp().sub(1).abs().reshape(-1, STEPS)
    assert deviation.max() > 1e-5
    verdict = check_ratio(replayed[:, None], rollout.trajectory.log_prob[rows][:, None], clip=1e-5)
    assert not verdict.ok


# What sampling under a recorder is: the pipeline itself.


def test_recording_with_the_ode_does_not_change_the_images(pipeline):
    def images():
        return call(pipeline, [picture(pipeline)], [CHAIN[0][0]], trajectory_generators(0, 1))

    plain = images()[0]
    with Recorder(pipeline):
        recorded = images()[0]
    assert recorded.tobytes() == plain.tobytes()


def test_clean_latents_are_those_that_the_pipeline_returns(kontext):
    given = options(kontext) | {"output_type": "latent"}
    with Recorder(kontext, FlowSDE(0.7), generators=trajectory_generators(0, 2)) as recorder:
        latents = kontext([picture(kontext)] * 2, CHAIN[0][:2], **given).images
    rollout = recorder.rollout(group=[0, 1])
    assert torch.equal(rollout.trajectory.clean[:, 0], latents)


def test_batching_does_not_change_a_trajectory(kontext):
    together = roll_out(kontext, FlowSDE(0.7), batch=3)
    for b in range(3):
        generators = trajectory_generators(10 + b, 1)
        images = [picture(kontext, b)]
        with Recorder(kontext, FlowSDE(0.7), generators=generators) as recorder:
            for turn in range(2):
                images = call(kontext, images, [CHAIN[b][turn]], generators)
        alone = recorder.rollout(group=[b]).trajectory
        batched = together.trajectory.select(slice(b, b + 1))
        torch.testing.assert_close(alone.latents[:, 0], batched.latents[:, 0], rtol=0, atol=1e-5)
        torch.testing.assert_close(alone.log_prob[:, 0], batched.log_prob[:, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_trajectory_says_which_steps_have_a_density(pipeline, reduction):
    rollout = roll_out(
        pipeline, FlowSDE(0.7), stochastic_steps=range(1, 2), reduction=reduction, batch=1
    )
    trajectory = rollout.trajectory
    assert trajectory.stochastic.tolist() == [[False, True, False]] * 2
    assert trajectory.reduction == reduction
    assert (trajectory.log_prob[..., [0, 2]] == 0).all()
    rows = all_rows(rollout)
    replayed = replay(rollout, pipeline.transformer, FlowSDE(0.7), rows).detach()
    size = trajectory.clean[0, 0].numel() if reduction == "sum" else 1
    torch.testing.assert_close(replayed, trajectory.log_prob[rows], rtol=0, atol=1e-6 * size)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_half_precision_replays_the_value_that_went_on(pipeline, guidance):
    pipeline.to(torch.bfloat16)
    solver = FlowSDE(0.7)
    rollout = roll_out(pipeline, solver, guidance=guidance)
    assert rollout.trajectory.latents.dtype == torch.bfloat16
    assert rollout.trajectory.log_prob.dtype == torch.float32
    for rows in some(batches_of_rollout(rollout, together=is_kontext(pipeline))):
        replayed = replay(rollout, pipeline.transformer, solver, rows)
        torch.testing.assert_close(
            replayed.detach(), rollout.trajectory.log_prob[rows], rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("embedded", [1.0, 3.5])
def test_embedded_guidance_is_a_constant(embedded):
    from mteditflow_examples.shapes.editor import build_kontext

    base = build_kontext()
    config = dict(base.transformer.config) | {"guidance_embeds": True}
    model = type(base.transformer).from_config(config).eval()
    pipeline = FluxKontextPipeline(**{**base.components, "transformer": model})
    pipeline.set_progress_bar_config(disable=True)
    with Recorder(pipeline, FlowSDE(0.7), generators=trajectory_generators(0, 2)) as recorder:
        call(
            pipeline,
            [picture(pipeline)] * 2,
            CHAIN[0][:2],
            trajectory_generators(0, 2),
            guidance_scale=embedded,
        )
    rollout = recorder.rollout(group=[0, 1])
    assert rollout.conditioning[0].stages[0].recipe.guidance is None
    rows = all_rows(rollout)
    replayed = replay(rollout, model, FlowSDE(0.7), rows).detach()
    torch.testing.assert_close(replayed, rollout.trajectory.log_prob[rows], rtol=0, atol=1e-6)


def test_a_batch_as_large_as_the_text_is_long_is_no_ambiguity(kontext):
    length = options(kontext)["max_sequence_length"]
    rollout = roll_out(kontext, FlowSDE(0.7), batch=length, turns=1, steps=2)
    assert rollout.conditioning[0].stages[0].calls[0].arguments["txt_ids"].shape == (length, 3)
    rows = [index[:5] for index in all_rows(rollout)]
    replayed = replay(rollout, kontext.transformer, FlowSDE(0.7), rows).detach()
    torch.testing.assert_close(
        replayed, rollout.trajectory.log_prob[tuple(rows)], rtol=0, atol=1e-6
    )


def test_arguments_may_be_positional(pipeline):
    def positional(_model, args, kwargs):
        return (kwargs.pop("hidden_states"), *args), kwargs

    handle = pipeline.transformer.register_forward_pre_hook(positional, with_kwargs=True)
    rollout = roll_out(pipeline, FlowSDE(0.7), turns=1, verify=False)
    handle.remove()
    rows = all_rows(rollout)
    replayed = replay(rollout, pipeline.transformer, FlowSDE(0.7), rows).detach()
    torch.testing.assert_close(replayed, rollout.trajectory.log_prob[rows], rtol=0, atol=1e-6)


class Gain(FluxTransformer2DModel):
    """Takes a dict, as for attention processors."""

    def forward(self, *args, options=None, **kwargs):
        return (super().forward(*args, **kwargs)[0] * options["gain"],)


def test_a_dict_that_the_pipeline_changes_between_branches(kontext):
    kontext.transformer.__class__ = Gain
    one_dict = {}

    def change(_model, args, kwargs):
        one_dict["gain"] = 3.0 - one_dict.get("gain", 2.0)  # 1, 2, 1, 2, ...
        return args, kwargs | {"options": one_dict}

    handle = kontext.transformer.register_forward_pre_hook(change, with_kwargs=True)
    rollout = roll_out(kontext, FlowSDE(0.7), turns=1, guidance=2.5, verify=False)
    handle.remove()
    branches = rollout.conditioning[0].stages[0].calls
    assert [branch.arguments["options"]["gain"] for branch in branches] == [1.0, 2.0]
    rows = all_rows(rollout)
    replayed = replay(rollout, kontext.transformer, FlowSDE(0.7), rows).detach()
    torch.testing.assert_close(replayed, rollout.trajectory.log_prob[rows], rtol=0, atol=1e-6)


def test_several_images_per_prompt_are_trajectories_of_their_own(kontext):
    generators = trajectory_generators(0, 3)
    with Recorder(kontext, FlowSDE(0.7), generators=generators) as recorder:
        call(
            kontext,
            [picture(kontext)],
            [CHAIN[0][0]],
            generators,
            num_images_per_prompt=3,
        )
    rollout = recorder.rollout(group=[0, 1, 2])
    rows = all_rows(rollout)
    replayed = replay(rollout, kontext.transformer, FlowSDE(0.7), rows).detach()
    torch.testing.assert_close(replayed, rollout.trajectory.log_prob[rows], rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
def test_recorded_under_any_grad_mode_it_replays_with_gradients(pipeline, mode):
    solver = FlowSDE(0.7)
    with mode():
        rollout = roll_out(pipeline, solver, guidance=2.5)
    for field in some(dataclasses.fields(rollout.trajectory)):
        value = getattr(rollout.trajectory, field.name)
        assert field.name == "reduction" or not (value.is_inference() or value.requires_grad)
    for rows in (all_rows(rollout), *batches_of_rollout(rollout, is_kontext(pipeline))):
        pipeline.transformer.zero_grad()
        replay(rollout, pipeline.transformer, solver, rows).sum().backward()
        assert pipeline.transformer.proj_out.weight.grad.abs().sum() > 0


# Storage.


def test_constant_conditioning_is_kept_once_per_turn(pipeline):
    kept = tensors(roll_out(pipeline, turns=1, batch=1, guidance=2.5, steps=2))
    assert kept == tensors(roll_out(pipeline, turns=1, batch=1, guidance=2.5, steps=5))


def tensors(rollout):
    """Shapes of the distinct tensors that the conditioning holds, with their storage's bytes."""
    found = {}
    for record in rollout.conditioning:
        for branch in record.stages[0].calls:
            values = [branch.rest, *branch.arguments.values()]
            for value in values:
                tensor = getattr(value, "tensor", value)
                if isinstance(tensor, torch.Tensor):
                    found[id(tensor)] = (tuple(tensor.shape), tensor.untyped_storage().nbytes())
    return sorted(found.values())


def test_branches_share_what_is_the_same(pipeline):
    (record,) = roll_out(pipeline, turns=1, batch=1, guidance=2.5).conditioning
    one, other = record.stages[0].calls
    assert one.rest.tensor is other.rest.tensor
    for name in ("img_ids", "txt_ids"):
        first, second = (
            getattr(branch.arguments[name], "tensor", branch.arguments[name])
            for branch in record.stages[0].calls
        )
        assert first is second or name == "txt_ids"
    assert one.arguments["encoder_hidden_states"] is not other.arguments["encoder_hidden_states"]


def test_reference_tokens_do_not_keep_the_noisy_ones_alive(kontext):
    (record,) = roll_out(kontext, turns=1, batch=1).conditioning
    rest = record.stages[0].calls[0].rest.tensor
    assert rest.untyped_storage().nbytes() == rest.numel() * rest.element_size()


@pytest.mark.parametrize("storage", ["cpu", None])
@pytest.mark.parametrize("late", [False, True])
def test_a_record_owns_its_tensors(kontext, storage, late):
    """What the caller does with its own after the call, or after the rollout, changes nothing."""
    embeds, pooled, _ = kontext.encode_prompt(CHAIN[0][0], CHAIN[0][0], max_sequence_length=8)
    given = options(kontext) | {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    generators = trajectory_generators(0, 1)
    solver = FlowSDE(0.7)
    with Recorder(kontext, solver, generators=generators, storage=storage) as recorder:
        kontext([picture(kontext)], **given)
    rollout = recorder.rollout(group=[0]) if late else None
    embeds.zero_()
    pooled.mul_(3)
    rollout = rollout or recorder.rollout(group=[0])
    rows = all_rows(rollout)
    replayed = replay(rollout, kontext.transformer, solver, rows).detach()
    torch.testing.assert_close(replayed, rollout.trajectory.log_prob[rows], rtol=0, atol=1e-6)


def test_a_change_in_place_while_the_pipeline_is_called_is_noticed(kontext):
    embeds, pooled, _ = kontext.encode_prompt(CHAIN[0][0], CHAIN[0][0], max_sequence_length=8)
    given = options(kontext) | {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def change(*_):
        embeds.mul_(1.0)
        return {}

    with (
        pytest.raises(ReplayError, match="encoder_hidden_states: changed in place while"),
        Recorder(kontext),
    ):
        kontext([picture(kontext)], **given, callback_on_step_end=change)


@pytest.mark.parametrize("solver", [None, FlowSDE(0.7)])
def test_two_recorders_of_one_pipeline_are_refused(kontext, solver):
    with (
        Recorder(kontext, solver),
        pytest.raises(ValueError, match="pipeline: it is already being recorded"),
        Recorder(kontext, solver),
    ):
        pass


def test_nothing_of_a_step_outlives_the_rollout(kontext):
    outputs = []
    handle = kontext.transformer.register_forward_hook(
        lambda _model, _args, output: outputs.append(weakref.ref(output[0]))
    )
    rollout = roll_out(kontext, FlowSDE(0.7), turns=1)
    handle.remove()
    gc.collect()
    assert [output() for output in outputs] == [None] * (STEPS + 1)  # one verifies
    assert len(rollout) == 2


# Rollouts as containers.


def test_select_keeps_rows_and_lets_go_of_the_rest(klein):
    solver = FlowSDE(0.7)
    rollout = roll_out(klein, solver, batch=3)
    for index in (torch.tensor([2, 0]), torch.tensor([True, False, True]), slice(1, None)):
        some = rollout.select(index)
        assert len(some.conditioning) == 4
        assert some.index.dtype == torch.int64
        everyone = torch.arange(3)[index]
        assert torch.equal(some.trajectory.latents, rollout.trajectory.latents[everyone])
        rows = all_rows(some)
        replayed = replay(some, klein.transformer, solver, rows).detach()
        torch.testing.assert_close(replayed, some.trajectory.log_prob[rows], rtol=0, atol=1e-6)


def test_concatenation_is_the_batch(kontext):
    solver = FlowSDE(0.7)
    whole = roll_out(kontext, solver, batch=4)
    parts = [whole.select(slice(0, 1)), whole.select(torch.tensor([3, 1, 2]))]
    joined = Rollout.concatenate(parts)
    order = torch.tensor([0, 3, 1, 2])
    assert torch.equal(joined.trajectory.latents, whole.trajectory.latents[order])
    rows = all_rows(joined)
    theirs = (order[rows[0]], *rows[1:])
    torch.testing.assert_close(
        replay(joined, kontext.transformer, solver, rows),
        replay(whole, kontext.transformer, solver, theirs),
        rtol=0,
        atol=1e-6,
    )


def test_chains_of_unequal_length_are_masked(klein):
    solver = FlowSDE(0.7)
    short, long = (roll_out(klein, solver, batch=1, turns=turns) for turns in (1, 2))
    for parts in ([short, long], [long, short]):
        joined = Rollout.concatenate(parts)
        mask = [[True, len(part.index[0]) == 2] for part in parts]
        assert joined.trajectory.turn_mask.tolist() == mask
        rows = all_rows(joined)
        replayed = replay(joined, klein.transformer, solver, rows).detach()
        torch.testing.assert_close(replayed, joined.trajectory.log_prob[rows], rtol=0, atol=1e-6)
    twice = Rollout.concatenate([joined, joined])
    for padded, short_row in ((joined, 1), (twice, 1), (twice, 3)):
        row, turn = torch.tensor([short_row]), torch.tensor([1])
        x_t = padded.trajectory.clean[row, turn]
        with pytest.raises(ValueError, match="turn: expected turns that exist"):
            padded.velocity(klein.transformer, x_t, turn / 2, row, turn)
        assert len(padded.select(row).conditioning) == 1


def test_rows_of_other_shapes_are_called_apart(klein):
    """Two references or one, longer or shorter prompts: rows mix all the same."""
    solver = FlowSDE(0.7)
    parts = []
    for images, length in ((1, 8), (2, 8), (1, 6)):
        generators = trajectory_generators(images + length, 1)
        with Recorder(klein, solver, generators=generators) as recorder:
            given = {"max_sequence_length": length}
            pictures = [picture(klein, k) for k in range(images)]
            call(klein, pictures, [CHAIN[0][0]], generators, **given)
        parts.append(recorder.rollout(group=[0]))
    rollout = Rollout.concatenate(parts)
    order = torch.randperm(3 * STEPS, generator=torch.Generator().manual_seed(0))
    rows = [index[order] for index in all_rows(rollout)]
    calls = count_calls(klein.transformer)
    replayed = replay(rollout, klein.transformer, solver, rows).detach()
    assert calls() == 3
    stored = rollout.trajectory.log_prob[tuple(rows)]
    torch.testing.assert_close(replayed, stored, rtol=0, atol=1e-6)


def count_calls(model):
    """Calls of a model from now until asked."""
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))

    def count():
        handle.remove()
        return len(calls)

    return count


def test_to_moves_everything_and_keeps_what_is_shared(kontext):
    rollout = roll_out(kontext)
    moved = rollout.to("cpu")
    assert len({record.at(1.0)[1] for record in moved.conditioning}) == 1
    assert tensors(moved) == tensors(rollout)


def test_concatenate_needs_something_alike(kontext):
    with pytest.raises(ValueError, match="parts: expected at least one Rollout"):
        Rollout.concatenate([])
    with pytest.raises(ValueError, match=r"parts\[1\].sigmas"):
        Rollout.concatenate([roll_out(kontext, steps=steps, turns=1) for steps in (2, 3)])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"sigma": torch.zeros(3)}, ValueError, r"sigma: expected shape \[M\] = \[2\]"),
        ({"trajectory": torch.tensor([0])}, ValueError, r"trajectory: expected shape"),
        ({"turn": torch.tensor([0])}, ValueError, r"turn: expected shape"),
        ({"turn": torch.tensor([0, 7])}, IndexError, "out of bounds"),
        ({"sigma": torch.tensor([0.5, 1.5])}, ValueError, r"sigma: expected values in \[0, 1\]"),
        ({"x_t": torch.zeros(2, 3, 16)}, ValueError, "x_t: expected shape .* axes of a latent"),
        ({"x_t": torch.zeros(0, 36, 16)}, ValueError, "x_t: expected a non-empty tensor"),
        ({"x_t": torch.zeros(2, 36, 16).long()}, TypeError, "x_t: expected a floating-point"),
        ({"sigma": torch.tensor([0, 1])}, TypeError, "sigma: expected a floating-point"),
    ],
)
def test_velocity_checks_its_rows(kontext, change, error, message):
    rollout = roll_out(kontext, turns=1)
    rows = torch.tensor([0, 1])
    given = {
        "x_t": rollout.trajectory.clean[:, 0],
        "sigma": torch.tensor([0.5, 0.5]),
        "trajectory": rows,
        "turn": torch.zeros_like(rows),
    }
    with pytest.raises(error, match=message):
        rollout.velocity(kontext.transformer, **given | change)
