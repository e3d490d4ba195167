"""LoraPolicies: three policies on one model, switched safely."""

import json

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from tiny import CHAIN, call, picture, roll_out
from tiny_pipelines.checks import replay
from torch import nn

from mteditflow import FlowSDE, interpolate, nft_loss, trajectory_generators, velocity_target
from mteditflow.pipelines import LoraPolicies, RolloutVelocity
from mteditflow.pipelines.lora_files import FILE
from mteditflow.testing import check_adapter, check_saved
from tests.loops import some

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def config(**options):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS} | options)


def disturb(parameters, seed=0, by=0.1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def policies(pipeline):
    """Policies of which no two are equal."""
    made = LoraPolicies(pipeline.transformer, config())
    disturb(made.parameters(), seed=1)
    disturb(made.old_parameters(), seed=2)
    made.update_old(decay=1.0)
    return made


@pytest.fixture
def outputs(pipeline, policies):
    """The model's velocity on fixed inputs, as a function."""
    rollout = roll_out(pipeline, turns=1)
    rows = torch.tensor([0, 1])
    x_t, sigma, turn = rollout.trajectory.clean[:, 0], torch.tensor([0.3, 0.8]), rows * 0
    return lambda: rollout.velocity(pipeline.transformer, x_t, sigma, rows, turn)


def state(policies):
    """All that switching touches."""
    adapters = [
        (layer.active_adapters, layer.disable_adapters) for layer in policies._layers.values()
    ]
    return adapters, [p.requires_grad for p in policies.model.parameters()]


def merged(pipeline, base, weights, scale):
    """Velocity weights computed by hand: base + scale * B A."""
    with torch.no_grad():
        for name, weight in base.items():
            part = name.removesuffix(".weight")
            if f"{part}.lora_A.weight" in weights:
                a, b = weights[f"{part}.lora_A.weight"], weights[f"{part}.lora_B.weight"]
                weight = weight + scale * (b @ a)
            pipeline.transformer.get_parameter(name).copy_(weight)


def test_each_policy_is_its_own_adapter_or_none(pipeline):
    """Against the low-rank product written out into the weights of a model without adapters."""
    rollout = roll_out(pipeline, turns=1)
    rows = torch.tensor([0, 1])
    given = rollout.trajectory.clean[:, 0], torch.tensor([0.3, 0.8]), rows, rows * 0
    base = {name: x.detach().clone() for name, x in pipeline.transformer.named_parameters()}
    plain = type(pipeline)(**pipeline.components)
    plain.transformer = type(pipeline.transformer).from_config(pipeline.transformer.config).eval()
    policies = LoraPolicies(pipeline.transformer, config())
    disturb(policies.parameters(), seed=1)
    disturb(policies.old_parameters(), seed=2)
    for policy in ("reference", "old", "current"):
        weights = {} if policy == "reference" else policies.state_dict(policy)
        merged(plain, base, weights, scale=2.0)
        with policies.use(policy):
            ours = rollout.velocity(pipeline.transformer, *given)
        theirs = rollout.velocity(plain.transformer, *given)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_a_fresh_adapter_changes_no_velocity_and_can_be_trained(pipeline):
    rollout = roll_out(pipeline, turns=1)
    rows = torch.tensor([0, 1])
    inputs = (rollout.trajectory.clean[:, 0], torch.tensor([0.3, 0.8]), rows, rows * 0)
    check_adapter(
        pipeline.transformer,
        lambda: rollout.velocity(pipeline.transformer, *inputs),
        lambda: LoraPolicies(pipeline.transformer, config()),
    )


def test_all_policies_start_equal(pipeline):
    before = {name: x.clone() for name, x in pipeline.transformer.state_dict().items()}
    rollout = roll_out(pipeline, FlowSDE(0.7), turns=1)
    policies = LoraPolicies(pipeline.transformer, config())
    rows = rollout.trajectory.step_mask.nonzero(as_tuple=True)
    for policy in ("current", "old", "reference"):
        with policies.use(policy):
            replayed = replay(rollout, pipeline.transformer, FlowSDE(0.7), rows)
        torch.testing.assert_close(replayed, rollout.trajectory.log_prob[rows], rtol=0, atol=1e-6)
    assert policies.old_equals_current
    kept = {k.replace("base_layer.", ""): x for k, x in pipeline.transformer.state_dict().items()}
    assert all(torch.equal(kept[name], x) for name, x in some(before.items()))


def test_outside_it_is_the_current_policy_and_trains_it_alone(policies, outputs):
    with policies.use("current"):
        inside = outputs()
    assert torch.equal(outputs(), inside)
    trained = {id(p) for p in policies.model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in policies.parameters()}
    outputs().square().sum().backward()
    assert all(p.grad is not None for p in some(policies.parameters()))
    assert all(p.grad is None for p in some(policies.old_parameters()))


@pytest.mark.parametrize("policy", ["old", "reference"])
def test_no_gradient_reaches_the_other_policies(policies, outputs, policy):
    with policies.use(policy):
        assert not outputs().requires_grad


@pytest.mark.parametrize("outer", ["current", "old", "reference"])
@pytest.mark.parametrize("inner", ["current", "old", "reference"])
def test_switching_nests_and_is_undone(policies, outputs, outer, inner):
    with policies.use(inner):
        expected_inner = outputs()
    with policies.use(outer):
        expected_outer, before = outputs(), state(policies)
        with policies.use(inner):
            assert torch.equal(outputs(), expected_inner)
        assert torch.equal(outputs(), expected_outer)
        assert state(policies) == before


@pytest.mark.parametrize("policy", ["old", "reference"])
def test_switching_is_undone_after_an_error(policies, outputs, policy):
    before, expected = state(policies), outputs()

    def fail():
        with policies.use(policy):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert state(policies) == before
    assert torch.equal(outputs(), expected)


def test_a_graph_made_before_a_switch_still_trains_the_current_policy(policies, outputs):
    loss = outputs().square().sum()
    with policies.use("old"):
        outputs()
    with policies.use("reference"):
        outputs()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in some(policies.parameters()))


def test_gradient_checkpointing_gives_the_same_gradients(policies, outputs):
    def gradients():
        loss = outputs().square().sum()
        with policies.use("reference"), torch.no_grad():
            outputs()
        return torch.autograd.grad(loss, policies.parameters())

    plain = gradients()
    policies.model.enable_gradient_checkpointing()
    policies.model.train()
    for ours, theirs in some(zip(gradients(), plain, strict=True)):
        torch.testing.assert_close(ours, theirs)


def test_train_and_eval_mode_are_left_alone(policies):
    for mode in (True, False):
        policies.model.train(mode)
        for policy in ("old", "reference", "current"):
            with policies.use(policy):
                assert all(module.training == mode for module in some(policies.model.modules()))


# The old policy.


def test_the_old_forward_is_skipped_while_old_equals_current(pipeline):
    policies = LoraPolicies(pipeline.transformer, config())
    velocity = torch.randn(2, 3, requires_grad=True)

    def never():
        raise AssertionError("the old policy was called")

    old = policies.old_velocity(velocity, never)
    assert torch.equal(old, velocity.detach())
    assert not old.requires_grad
    disturb(policies.parameters()[-1:])
    assert not policies.old_equals_current
    called = policies.old_velocity(velocity, lambda: velocity + 1)
    assert torch.equal(called, velocity.detach() + 1)
    assert not called.requires_grad
    policies.update_old(decay=0.5)
    assert not policies.old_equals_current
    policies.update_old(decay=0.0)
    assert policies.old_equals_current


def test_the_old_forward_is_that_of_the_old_policy(policies, outputs):
    with policies.use("old"):
        expected = outputs()
    velocity = outputs()
    assert torch.equal(policies.old_velocity(velocity, outputs), expected)
    assert not torch.equal(velocity, expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
        lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    ],
)
def test_a_step_of_any_optimiser_makes_them_differ(pipeline, make):
    policies = LoraPolicies(pipeline.transformer, config())
    optimizer = make(policies.parameters())
    for parameter in policies.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert not policies.old_equals_current


def test_a_change_through_data_is_seen(pipeline):
    policies = LoraPolicies(pipeline.transformer, config())
    assert policies.old_equals_current
    policies.parameters()[3].data.add_(1.0)
    assert not policies.old_equals_current


@pytest.mark.parametrize("decay", [0.0, 0.3, 1.0])
def test_update_of_the_old_policy_is_a_moving_average(policies, decay):
    before = [p.detach().clone() for p in policies.old_parameters()]
    policies.update_old(decay=decay)
    for old, was, now in some(
        zip(policies.old_parameters(), before, policies.parameters(), strict=True)
    ):
        torch.testing.assert_close(old.detach(), decay * was + (1 - decay) * now.detach())


def test_a_slow_old_policy_of_a_half_precision_model_moves(pipeline):
    pipeline.to(torch.bfloat16)
    policies = LoraPolicies(pipeline.transformer, config())
    assert {p.dtype for p in (*policies.parameters(), *policies.old_parameters())} == {
        torch.float32
    }
    disturb(policies.parameters(), by=1e-4)
    before = [p.detach().clone() for p in policies.old_parameters()]
    policies.update_old(decay=0.999)
    moved = zip(policies.old_parameters(), before, strict=True)
    assert all(not torch.equal(old, was) for old, was in some(moved))
    image = call(pipeline, [picture(pipeline)], [CHAIN[0][0]], trajectory_generators(0, 1))
    assert len(image) == 1
    rollout = roll_out(pipeline, FlowSDE(0.7), turns=1)
    rows = rollout.trajectory.step_mask.nonzero(as_tuple=True)
    replay(rollout, pipeline.transformer, FlowSDE(0.7), rows).sum().backward()
    assert all(p.grad is not None for p in some(policies.parameters()))


def test_one_round_of_nft_moves_toward_good_and_away_from_bad(kontext):
    """The whole loop: roll out as the old policy, train the current one, move the old one."""
    policies = LoraPolicies(kontext.transformer, config())
    with policies.use("old"):
        rollout = roll_out(kontext, batch=2, turns=2)
    rows = rollout.trajectory.turn_mask.nonzero(as_tuple=True)
    clean, sigma = rollout.trajectory.clean[rows], torch.full((len(rows[0]),), 0.5)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    x_t, target = interpolate(clean, noise, sigma), velocity_target(clean, noise)
    r = torch.tensor([1.0, 0.0])[rows[0]]

    def forward():
        return rollout.velocity(kontext.transformer, x_t, sigma, *rows)

    def distance():
        with torch.no_grad():
            return (forward() - target).square().flatten(1).mean(dim=1)

    before, optimizer = distance(), torch.optim.Adam(policies.parameters(), lr=1e-3)
    for _ in range(4):
        velocity = forward()
        old = policies.old_velocity(velocity, forward)
        loss = nft_loss(velocity, old, target, r, nft_beta=1.0).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    change = distance() - before
    assert (change[r == 1] < 0).all()
    assert (change[r == 0] > 0).all()
    policies.update_old(decay=0.0)
    assert policies.old_equals_current


# Files.


def test_a_pipeline_loads_what_was_saved(pipeline, policies, tmp_path):
    def image(of):
        generators = trajectory_generators(0, 1)
        return call(of, [picture(of)], [CHAIN[0][0]], generators)[0].tobytes()

    expected = image(pipeline)
    policies.save(pipeline, tmp_path)
    components = dict(pipeline.components)
    with policies.use("reference"):
        base = {k: x for k, x in pipeline.transformer.state_dict().items() if "lora" not in k}
    transformer = type(pipeline.transformer).from_config(pipeline.transformer.config).eval()
    transformer.load_state_dict({k.replace("base_layer.", ""): x for k, x in base.items()})
    fresh = type(pipeline)(**components | {"transformer": transformer})
    fresh.set_progress_bar_config(disable=True)
    without = image(fresh)
    fresh.load_lora_weights(tmp_path)
    assert image(fresh) == expected
    assert without != expected


def test_a_saved_file_loads_to_the_same_velocity(pipeline, policies, outputs, tmp_path):
    check_saved(
        outputs,
        lambda: disturb(policies.parameters(), seed=3),
        lambda: policies.save(pipeline, tmp_path),
        lambda: policies.load(pipeline, tmp_path),
    )


def test_equal_weights_are_saved_as_equal_bytes(kontext, tmp_path):
    """The library writes its metadata, and a set its members, in an order of chance."""
    policies = LoraPolicies(kontext.transformer, config())
    found = set()
    for number in range(8):  # an order of chance would be one in 128
        policies.save(kontext, tmp_path / f"{number}")
        found.add((tmp_path / f"{number}" / FILE).read_bytes())
    assert len(found) == 1
    with safe_open(tmp_path / "0" / FILE, "pt") as file:
        metadata = file.metadata()
    assert set(metadata) == {"format", "lora_adapter_metadata"}
    names = json.loads(metadata["lora_adapter_metadata"])["transformer.target_modules"]
    assert names == sorted(names)
    assert len(names) > 1


def test_training_resumes_from_what_was_saved(pipeline, policies, tmp_path):
    policies.save(pipeline, tmp_path)
    weights = [p.detach().clone() for p in policies.parameters()]
    old = [p.detach().clone() for p in policies.old_parameters()]
    disturb(policies.parameters(), seed=3)
    policies.load(pipeline, tmp_path)
    assert all(torch.equal(p, w) for p, w in some(zip(policies.parameters(), weights, strict=True)))
    assert all(torch.equal(p, w) for p, w in some(zip(policies.old_parameters(), old, strict=True)))
    policies.load(pipeline, tmp_path, policy="old")
    assert policies.old_equals_current


def test_a_saved_average_is_what_a_pipeline_loads(kontext, tmp_path):
    """Also from a state at hand, as one rank of several writes it."""
    policies = LoraPolicies(kontext.transformer, config(), ema=True)
    disturb(policies.parameters())
    policies.update_ema(decay=0.5)
    policies.save(kontext, tmp_path / "a", policy="ema")
    policies.save(kontext, tmp_path / "b", policy="ema", state=policies.state_dict("ema"))
    expected = policies.state_dict("ema")
    for folder in ("a", "b"):
        disturb(policies.parameters())
        policies.load(kontext, tmp_path / folder)
        assert all(
            torch.equal(x, expected[name]) for name, x in some(policies.state_dict().items())
        )


def test_a_state_is_a_copy(policies):
    given = policies.state_dict()
    kept = {name: x.clone() for name, x in given.items()}
    disturb(policies.parameters(), seed=5)
    assert all(torch.equal(given[name], x) for name, x in some(kept.items()))
    assert not any(x.requires_grad for x in some(given.values()))


def test_loading_another_adapter_is_refused_and_changes_nothing(policies):
    weights = [p.detach().clone() for p in policies.parameters()]
    given = policies.state_dict()
    name = sorted(given)[0]
    for wrong in (
        {k: x for k, x in given.items() if k != name},
        given | {"other.lora_A.weight": torch.zeros(1)},
        given | {name: torch.zeros(1, 1)},
    ):
        (differing,) = [k for k in given.keys() | wrong if given.get(k) is not wrong.get(k)]
        message = rf"names or shapes are not those of the adapter .*, as in \['{differing}'\]$"
        with pytest.raises(ValueError, match=message):
            policies.load_state_dict(wrong)
    assert all(torch.equal(p, w) for p, w in some(zip(policies.parameters(), weights, strict=True)))


# Velocities for objectives.


@pytest.mark.parametrize("policy", ["old", "reference"])
def test_the_current_policy_is_not_asked_for_inside_of_another(policies, policy):
    policies.check_current()
    with policies.use(policy), pytest.raises(RuntimeError, match=rf"inside use\('{policy}'\)"):
        policies.check_current()


@pytest.fixture
def states(pipeline, policies):
    """A rollout, and two noisy states of its turns: x_t, sigma, at."""
    rollout = roll_out(pipeline, turns=2)
    at = torch.tensor([[1, 0], [0, 1]])
    return rollout, (rollout.clean_at(at), torch.tensor([0.3, 0.8]), at)


@pytest.mark.parametrize("policy", ["old", "reference"])
def test_a_velocity_is_that_of_its_policy_without_gradient(policies, states, policy):
    rollout, (x_t, sigma, at) = states
    velocity = RolloutVelocity(policies, rollout)(policy, x_t.requires_grad_(), sigma, at)
    assert not velocity.requires_grad
    with policies.use(policy):
        assert torch.equal(velocity, rollout.velocity(policies.model, x_t, sigma, *at.T))
    assert not torch.equal(velocity, rollout.velocity(policies.model, x_t, sigma, *at.T))


def test_the_current_velocity_takes_gradients_also_when_blocks_are_recomputed(policies, states):
    """Backward comes after another policy was called: it must recompute the current one."""
    rollout, rows = states
    velocity = RolloutVelocity(policies, rollout)

    def gradients():
        loss = velocity("current", *rows).square().sum()
        velocity("reference", *rows)
        return torch.autograd.grad(loss, policies.parameters())

    plain = gradients()
    assert any(g.abs().max() > 0 for g in plain)
    policies.model.enable_gradient_checkpointing()
    policies.model.train()
    for ours, theirs in some(zip(gradients(), plain, strict=True)):
        torch.testing.assert_close(ours, theirs)


def test_the_current_velocity_enters_no_context_of_a_policy(policies, states, monkeypatch):
    rollout, rows = states
    expected = rollout.velocity(policies.model, *rows[:2], *rows[2].T)
    monkeypatch.delattr(LoraPolicies, "use")
    assert torch.equal(RolloutVelocity(policies, rollout)("current", *rows), expected)


def test_a_teacher_is_a_policy_on_a_rollout_of_its_own(pipeline, policies, states):
    rollout, (x_t, sigma, at) = states
    clean = roll_out(pipeline, turns=2, steps=1).select(torch.tensor([1, 0]))
    velocity = RolloutVelocity(policies, rollout, teacher=("reference", clean))
    taught = velocity("teacher", x_t, sigma, at)
    with policies.use("reference"), torch.no_grad():
        assert torch.equal(taught, clean.velocity(policies.model, x_t, sigma, *at.T))
    assert not torch.equal(taught, velocity("reference", x_t, sigma, at))


def test_an_average_has_velocities_where_there_is_one(kontext):
    policies = LoraPolicies(kontext.transformer, config(), ema=True)
    disturb(policies.parameters())
    rollout = roll_out(kontext, turns=1)
    rows = rollout.clean_at(torch.tensor([[0, 0]])), torch.tensor([0.5]), torch.tensor([[0, 0]])
    velocity = RolloutVelocity(policies, rollout)
    assert torch.equal(velocity("ema", *rows), velocity("reference", *rows))
    assert not torch.equal(velocity("ema", *rows), velocity("current", *rows))


def test_velocities_refuse_what_is_not_there(policies, states):
    rollout, (x_t, sigma, at) = states
    velocity = RolloutVelocity(policies, rollout)
    with pytest.raises(ValueError, match=r"^policy: there is no 'teacher'; make RolloutVelocity"):
        velocity("teacher", x_t, sigma, at)
    with pytest.raises(ValueError, match=r"^policy: there is no 'ema'"):
        velocity("ema", x_t, sigma, at)
    with pytest.raises(ValueError, match=r"^policy: .*new"):
        velocity("new", x_t, sigma, at)
    with pytest.raises(ValueError, match=r"^at: expected shape \[M, 2\] = \[2, 2\]"):
        velocity("current", x_t, sigma, at[:, :1])
    with pytest.raises(ValueError, match=r"^policy: .*new"):
        RolloutVelocity(policies, rollout, teacher=("new", rollout))
    with pytest.raises(ValueError, match=r"^teacher: turn_mask: expected shape \[B, N\]"):
        RolloutVelocity(policies, rollout, teacher=("old", rollout.select(slice(1))))


def test_a_rollout_offers_what_objectives_sample(states):
    rollout, _ = states
    trajectory = rollout.trajectory
    for name in ("group", "turn_mask", "step_mask"):
        assert torch.equal(getattr(rollout, name), getattr(trajectory, name))
    assert rollout.reduction == trajectory.reduction
    at, rows = torch.tensor([[1, 0]]), torch.tensor([[1, 0, 2]])
    assert torch.equal(rollout.clean_at(at), trajectory.clean[1:2, 0])
    assert torch.equal(rollout.steps_at(rows).x_t, trajectory.latents[1:2, 0, 2])


# The averaged policy.


@pytest.fixture
def averaged():
    """Policies on one layer, the average not equal to the others."""
    model = nn.Sequential(nn.Linear(3, 3))
    made = LoraPolicies(model, LoraConfig(r=2, target_modules=["0"]), ema=True)
    disturb(made.parameters(), seed=1)
    made.update_ema(decay=0.5)
    return made


def _ema_weights(policies):
    state = policies.state_dict("ema")
    return [x for name, x in some(state.items()) if not name.endswith(".lora_scale")]


def test_the_average_starts_as_the_current_policy_and_follows_it():
    """By hand: 0.75 * 1 + 0.25 * 3 = 1.5, then 0.5 * 1.5 + 0.5 * 3 = 2.25."""
    config = LoraConfig(r=1, target_modules=["0"])
    policies = LoraPolicies(nn.Sequential(nn.Linear(2, 2)), config, ema=True)
    for name, x in some(policies.state_dict("ema").items()):
        assert torch.equal(x, policies.state_dict()[name])
    for value, decay, expected in [(1, 0.0, 1.0), (3, 0.75, 1.5), (3, 0.5, 2.25), (3, 1.0, 2.25)]:
        with torch.no_grad():
            for weight in policies.parameters():
                weight.fill_(value)
        policies.update_ema(decay=decay)
        assert {float(v) for x in _ema_weights(policies) for v in x.flatten()} == {expected}
    policies.load_state_dict(policies.state_dict(), "old")
    assert policies.old_equals_current


def test_the_average_is_a_policy_of_its_own(averaged):
    model, x = averaged.model, torch.ones(1, 3)
    weights, average = averaged.state_dict(), averaged.state_dict("ema")
    with averaged.use("ema"):
        output = model(x)
        assert not output.requires_grad
        with averaged.use("old"):
            assert not torch.equal(model(x), output)
        assert torch.equal(model(x), output)
    assert not torch.equal(model(x), output)
    averaged.load_state_dict(average)
    assert torch.equal(model(x), output)
    averaged.load_state_dict(weights, "ema")
    with averaged.use("ema"):
        assert not torch.equal(model(x), output)


def test_only_the_current_policy_ever_takes_gradients(averaged):
    def trained():
        return {id(p) for p in averaged.model.parameters() if p.requires_grad}

    current = {id(p) for p in averaged.parameters()}
    assert trained() == current
    for policy in ("ema", "old", "reference", "current"):
        with averaged.use(policy):
            assert trained() == current
    assert trained() == current


def test_an_average_changes_nothing_for_the_others():
    def made(ema):
        model = nn.Sequential(nn.Linear(3, 3))
        return LoraPolicies(model, LoraConfig(r=2, target_modules=["0"]), seed=4, ema=ema)

    for policy in ("current", "old"):
        (with_it, without) = (made(ema).state_dict(policy) for ema in (True, False))
        assert all(torch.equal(with_it[name], x) for name, x in some(without.items()))


def test_there_is_no_average_unless_asked_for(policies):
    for use in (
        lambda: policies.use("ema").__enter__(),
        lambda: policies.update_ema(decay=0.5),
        lambda: policies.state_dict("ema"),
        lambda: policies.load_state_dict({}, "ema"),
    ):
        with pytest.raises(ValueError, match="there is no 'ema'; make LoraPolicies with ema=True"):
            use()


def test_adapters_are_float32_in_a_bfloat16_model():
    model = nn.Sequential(nn.Linear(3, 3)).bfloat16()
    policies = LoraPolicies(model, LoraConfig(r=2, target_modules=["0"]), ema=True)
    for policy in ("current", "old", "ema"):
        assert {x.dtype for x in policies.state_dict(policy).values()} == {torch.float32}


@pytest.mark.parametrize("mark", ["ds_id", "_hp_mapping"])
def test_refuses_weights_that_deepspeed_keeps_elsewhere(averaged, mark):
    """ZeRO-3 leaves empty parameters; ZeRO-1 and 2 overwrite them by float32 copies of theirs."""
    state = averaged.state_dict()
    setattr(averaged.parameters()[0], mark, 1)
    for use in (averaged.state_dict, lambda: averaged.load_state_dict(state)):
        with pytest.raises(RuntimeError, match="DeepSpeed keeps these weights elsewhere"):
            use()


# Making them.


def test_the_seed_decides_and_the_global_generator_stays():
    def made(seed):
        torch.manual_seed(7)
        model = nn.Sequential(nn.Linear(3, 3))
        before = torch.get_rng_state()
        policies = LoraPolicies(model, LoraConfig(r=2, target_modules=["0"]), seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        return policies.parameters()[0]

    assert torch.equal(made(0), made(0))
    assert not torch.equal(made(0), made(1))


def test_refuses_a_model_with_adapters(pipeline, policies):
    with pytest.raises(ValueError, match="model: expected one without adapters"):
        LoraPolicies(pipeline.transformer, config())


def test_refuses_targets_that_are_nowhere(pipeline):
    with pytest.raises(ValueError, match="nothing"):
        LoraPolicies(pipeline.transformer, config(target_modules=["nothing"]))


@pytest.mark.parametrize("policy", ["default", "Old", ""])
def test_refuses_an_unknown_policy(policies, policy):
    with pytest.raises(ValueError, match="policy: expected one of"), policies.use(policy):
        pass


def test_refuses_the_reference_where_weights_are_needed(policies):
    with pytest.raises(ValueError, match="policy: expected one of"):
        policies.state_dict("reference")


def test_refuses_a_decay_out_of_range(policies):
    with pytest.raises(ValueError, match="decay"):
        policies.update_old(decay=1.5)
