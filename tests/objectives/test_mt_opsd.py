"""MT-OPSD: which states are trained, the two losses, what gets a gradient, errors."""

import pytest
import torch

from mteditflow import mt_opsd_loss
from mteditflow.flow.trajectory import Trajectory
from mteditflow.objectives import MTOPSD, RoundKey, Samples, WornSamples
from mteditflow.objectives.units import member_rows
from tests.loops import some

B, S = 6, 4
IDENTITY = torch.tensor([True, False, False, True, False, False])
KEY = RoundKey(0, 3)


def trajectories(turns=1):
    """Trajectories whose states differ everywhere."""
    random = torch.Generator().manual_seed(0)
    return Trajectory(
        latents=torch.randn(B, turns, S + 1, 3, 2, generator=random),
        sigmas=torch.tensor([1.0, 0.9, 0.6, 0.2, 0.0]).expand(turns, -1),
        log_prob=torch.zeros(B, turns, S),
        stochastic=torch.zeros(turns, S, dtype=torch.bool),
        group=torch.arange(B) // 2,
        turn_mask=torch.ones(B, turns, dtype=torch.bool),
        reduction="mean",
    )


def worn(turns=1):
    random = torch.Generator().manual_seed(1)
    return WornSamples(trajectories(turns), IDENTITY, torch.randn(B, 3, 2, generator=random))


class Editor:
    """A linear student and teacher; what they were called with."""

    def __init__(self, *, alike=False):
        self.weight = torch.tensor(0.3, requires_grad=True)
        self.teacher = torch.tensor(0.3 if alike else 0.5, requires_grad=True)
        self.calls = {}

    def __call__(self, policy, x_t, sigma, at):
        self.calls[policy] = x_t, sigma, at
        return (self.weight if policy == "current" else self.teacher) * x_t


def test_edits_follow_the_teacher_and_the_rest_its_own_picture():
    """By hand from what the velocities were called with: float64, row by row."""
    objective, samples, editor = MTOPSD(identity_weight=7.0), worn(), Editor()
    (units,) = objective.units(samples, key=KEY)
    output = objective(editor, samples, units)
    loss = output.loss.detach()
    x_t, sigma, at = editor.calls["current"]
    steps = samples.steps_at(units.rows[:, 0])
    assert units.count == len(units) == 2 * B
    for row in some(range(len(units))):
        b, x = int(at[row, 0]), x_t[row].double()
        if IDENTITY[b]:
            clean = samples.given[b].double()
            noise = (x - (1 - sigma[row]) * clean) / sigma[row]
            expected = 7 * (0.3 * x - (noise - clean)).square().mean()
            own = torch.Generator().manual_seed(int(units.seed[row, 0]))
            drawn = torch.randn(3, 2, generator=own, dtype=torch.float32)
            torch.testing.assert_close(noise.float(), drawn, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(x_t[row], steps.x_t[row])  # the state that the student reached
            expected = (0.3 * x - 0.5 * x).square().mean()
        assert float(loss[row]) == pytest.approx(float(expected), rel=1e-4)
    asked = IDENTITY[at[:, 0]]
    edit, still = (output.metrics[f"{name}_loss"] for name in ("edit", "identity"))
    assert torch.equal(edit > 0, ~asked)
    assert torch.equal(still > 0, asked)
    torch.testing.assert_close(edit + 7 * still, output.metrics["policy_loss"])


def test_a_student_like_its_teacher_has_nothing_to_learn_from_edits():
    """v_S = v_T at one state, as where nothing has worn out and both have the same weights."""
    objective, samples = MTOPSD(), worn()
    (units,) = objective.units(samples, key=KEY)
    output = objective(Editor(alike=True), samples, units)
    asked = IDENTITY[units.rows[:, 0, 0]]
    assert float(output.loss.detach()[~asked].abs().max()) == 0.0
    assert float(output.loss.detach()[asked].min()) > 0


def test_a_student_that_returns_what_it_is_given_has_nothing_to_learn_there():
    samples, objective = worn(), MTOPSD()
    (units,) = objective.units(samples, key=KEY)

    def velocity(policy, x_t, sigma, at):
        """Straight to the given picture: (x - c) / sigma is n - c."""
        return (x_t - samples.given[at[:, 0]]) / sigma.view(-1, 1, 1)

    output = objective(velocity, samples, units)
    asked = IDENTITY[units.rows[:, 0, 0]]
    assert float(output.loss[asked].max()) < 1e-10


def test_the_student_alone_gets_a_gradient():
    samples, editor = worn(), Editor()
    (units,) = MTOPSD().units(samples, key=KEY)
    MTOPSD()(editor, samples, units).loss.sum().backward()
    assert editor.weight.grad.abs() > 0
    assert editor.teacher.grad is None


def test_a_step_moves_toward_the_teacher():
    samples, editor = worn(), Editor()
    (units,) = MTOPSD(identity_weight=0.0).units(samples, key=KEY)
    before = MTOPSD(identity_weight=0.0)(editor, samples, units).loss.sum()
    before.backward()
    with torch.no_grad():
        editor.weight -= 1e-3 * editor.weight.grad.sign()
    assert editor.weight > 0.3  # the teacher's is 0.5
    assert MTOPSD(identity_weight=0.0)(editor, samples, units).loss.sum() < before


def test_the_last_turn_is_trained_and_samples_without_worn_pictures_are_edits():
    samples = trajectories(turns=3)
    (units,) = MTOPSD(queries=3).units(samples, key=KEY)
    assert units.rows[:, 0, 1].unique().tolist() == [2]
    output = MTOPSD()(Editor(), samples, units)
    assert float(output.metrics["identity_loss"].max()) == 0


@pytest.mark.parametrize(("alpha", "beta"), [(2.0, 5.0), (5.0, 5.0)])
def test_states_are_of_the_beta_distribution(alpha, beta):
    """Shares of the four steps against the distribution's own, 5 standard deviations."""
    objective = MTOPSD(queries=400, query_alpha=alpha, query_beta=beta)
    (units,) = objective.units(worn(), key=KEY)
    position = torch.linspace(0, 1, 100_001, dtype=torch.float64)[1:-1]
    density = position ** (alpha - 1) * (1 - position) ** (beta - 1)
    expected = torch.stack([x.sum() for x in density.chunk(S)]) / density.sum()
    shares = torch.bincount(units.rows[:, 0, 2], minlength=S) / len(units)
    deviation = (expected * (1 - expected) / len(units)).sqrt()
    assert bool(((shares - expected).abs() < 5 * deviation + 1e-4).all())


def test_ranks_and_resumed_runs_draw_the_same():
    samples = worn()
    (whole,) = MTOPSD().units(samples, key=KEY)
    half = WornSamples(samples.samples.select(slice(3, 6)), IDENTITY[3:], samples.given[3:])
    (second,) = MTOPSD().units(half, key=RoundKey(0, 3, first=3))
    own = whole.rows[:, 0, 0] >= 3
    assert torch.equal(whole.rows[own] - torch.tensor([3, 0, 0]), second.rows)
    assert torch.equal(whole.seed[own], second.seed)
    (other,) = MTOPSD().units(samples, key=RoundKey(0, 4))
    assert not torch.equal(whole.seed, other.seed)


def test_worn_samples_are_samples_and_refuse_what_does_not_fit():
    samples = worn()
    assert isinstance(samples, Samples)
    at = torch.tensor([[4, 0]])
    assert torch.equal(samples.clean_at(at), samples.samples.clean_at(at))
    with pytest.raises(ValueError, match="given: expected shape"):
        WornSamples(samples.samples, IDENTITY, samples.given[:2])
    with pytest.raises(TypeError, match="identity: expected a boolean mask"):
        WornSamples(samples.samples, IDENTITY.long(), samples.given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"edit_share": 0.0}, "edit_share: expected a finite number in"),
        ({"identity_weight": -1.0}, "identity_weight: expected a finite number"),
        ({"queries": 0}, "queries: expected an integer >= 1"),
        ({"query_alpha": 0.0}, "query_alpha: expected a finite number"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        MTOPSD(**options)
    with pytest.raises(TypeError, match="advantage: expected None for MTOPSD"):
        MTOPSD().units(worn(), torch.zeros(B), key=KEY)


def test_rows_that_do_not_exist_are_left_out():
    valid = torch.tensor([True, False, True, True, False, True])
    (units,) = MTOPSD().units(worn(), valid=valid, key=KEY)
    assert sorted(set(member_rows(units)[:, 0].tolist())) == [0, 2, 3, 5]


LOSS = {
    "velocity": torch.tensor([[1.0, 2.0], [1.0, 0.0], [torch.nan, 0.0]]),
    "teacher_velocity": torch.tensor([[2.0, 2.0], [torch.nan, 0.0], [0.0, 0.0]]),
    "identity_target": torch.tensor([[torch.nan, 0.0], [0.0, 0.0], [0.0, 0.0]]),
}


def test_loss_golden_masks_and_gradient():
    """((1 - 2)^2 + 0) / 2 = 0.5; 10 (1^2 + 0) / 2 = 5; the third row is masked."""
    velocity = LOSS["velocity"].clone().requires_grad_()
    loss = mt_opsd_loss(
        velocity,
        LOSS["teacher_velocity"],
        LOSS["identity_target"],
        [False, True, False],
        valid=torch.tensor([True, True, False]),
    )
    assert loss.tolist() == [0.5, 5.0, 0.0]
    loss.sum().backward()
    # 2 (1 - 2) / 2 = -1; 10 * 2 * 1 / 2 = 10
    assert velocity.grad.tolist() == [[-1.0, 0.0], [10.0, 0.0], [0.0, 0.0]]


def test_loss_errors():
    x, rows = torch.zeros(2, 3), torch.tensor([True, False])
    with pytest.raises(ValueError, match="identity_target: expected"):
        mt_opsd_loss(x, x, x[:, :2], rows)
    with pytest.raises(ValueError, match="identity: expected"):
        mt_opsd_loss(x, x, x, rows[:1])
    with pytest.raises(TypeError, match="identity: expected a boolean mask"):
        mt_opsd_loss(x, x, x, rows.float())
    with pytest.raises(ValueError, match="identity_weight: expected a finite number"):
        mt_opsd_loss(x, x, x, rows, identity_weight=-1.0)
