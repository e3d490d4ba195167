"""How laws search: the smallest case, the same one every time, and what a message has in it."""

import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

import mteditflow as mt
from mteditflow.testing import (
    KINDS,
    GaussianFlow,
    GaussianPolicy,
    GroupAdvantage,
    LawBroken,
    LogProb,
    Loss,
    PolicyLoss,
    SolverStep,
    TurnCreditFunction,
    check_adapter,
    check_group_advantage,
    check_policy_loss,
    check_replay,
    check_saved,
    group_ids,
    laws_of,
    reward_batches,
    sigma_grids,
    turn_batches,
)
from mteditflow.testing.advantage import ADVANTAGE
from mteditflow.testing.densities import Density
from mteditflow.testing.fusion import Fusion
from mteditflow.testing.law import expect_close
from mteditflow.testing.losses import LOSS
from mteditflow.testing.policy_losses import POLICY_LOSS
from mteditflow.testing.signatures import SIGNATURES, Signature
from mteditflow.testing.strategies import signs
from tests.loops import some

PAGE = (Path(__file__).parents[2] / "docs" / "testing.md").read_text()
# Also where the profile draws anew.
SAME = settings(max_examples=5000, derandomize=True, database=None)
FIRST = settings(SAME, phases=[Phase.generate])


@pytest.fixture(autouse=True)
def messages_have_the_smallest_case(smallest_cases):
    """Whatever the profile of the run."""


def exactly(message):
    return f"^{re.escape(message)}$"


def without_mean(reward, group, valid=None):
    return mt.group_advantage(reward, group, valid=valid) + reward.mean()


def numpy_advantage(reward, group, valid=None):
    valid = np.ones(len(reward), dtype=bool) if valid is None else valid
    out = np.zeros(len(reward))
    for name in np.unique(group[valid]):
        members = (group == name) & valid
        centered = reward[members] - reward[members].mean()
        if np.ptp(reward[members]) > 0:
            out[members] = centered / (centered.std() + 1e-4)
    return out


# the search


def test_the_message_has_the_smallest_case_and_why_it_matters():
    with pytest.raises(LawBroken) as broken:
        ADVANTAGE["zero-sum"].check(GroupAdvantage(without_mean))
    assert broken.value.case["reward"].tolist() == [0.125]
    assert str(broken.value) == (
        "zero-sum: The advantages of a group add up to 0.\n"
        "  reward = [0.125]\n"
        "  group = [0]\n"
        "  expected advantages of group 0 that add up to 0\n"
        "  got      0.125, of [0.125]\n"
        "  Why it matters: What is left over pushes every sample of the group up or down, whatever "
        "the policy did.\n"
        "  Not a property of your function? Describe it by --min-members, or leave "
        "the law out: --without zero-sum"
    )


@pytest.mark.parametrize(("phases", "smallest"), [("smallest_cases", True), ("first_cases", False)])
def test_a_profile_that_does_not_shrink_is_honored(request, phases, smallest):
    def wrong_for_five(reward, group, valid=None):
        return mt.group_advantage(reward, group, valid=valid) + (len(reward) > 4)

    request.getfixturevalue(phases)
    with pytest.raises(LawBroken) as broken:
        ADVANTAGE["zero-sum"].check(GroupAdvantage(wrong_for_five))
    assert (broken.value.case["reward"].tolist() == [0.0] * 5) is smallest


def test_the_same_seed_draws_the_same_cases_and_another_one_others():
    def cases(seed, examples=20):
        seen = []

        def advantage(reward, group, valid=None):
            seen.append((reward.tolist(), group.tolist()))
            return mt.group_advantage(reward, group, valid=valid)

        ADVANTAGE["zero-sum"].check(GroupAdvantage(advantage), examples=examples, seed=seed)
        return seen

    assert cases(0) == cases(0)
    assert cases(0) != cases(1)
    assert len(cases(0, examples=7)) == 7


def test_the_callers_random_state_and_defaults_are_left_alone():
    state = torch.get_rng_state()
    check_group_advantage(mt.group_advantage, examples=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == torch.float32


def test_all_broken_laws_are_told_at_once_and_can_be_chosen():
    with pytest.raises(AssertionError, match=r"^3 laws are broken\n") as broken:
        check_group_advantage(
            without_mean, only=["shift", "zero-sum", "mask-equals-deletion"], examples=30
        )
    for name in ("shift", "zero-sum", "mask-equals-deletion"):
        assert f"\n{name}: " in f"\n{broken.value}"
    check_group_advantage(without_mean, only=["monotone", "pure"], examples=5)
    with pytest.raises(LawBroken, match=r"^shift: "):
        check_group_advantage(without_mean, only=["shift", "zero-sum"], without=["zero-sum"])


def test_what_the_function_raises_breaks_the_law():
    def fails(reward, group, valid=None):
        raise ZeroDivisionError("division by zero")

    with pytest.raises(LawBroken, match=r"got      the exception ZeroDivisionError: "):
        ADVANTAGE["shift"].check(GroupAdvantage(fails))


def test_a_result_of_another_shape_breaks_the_law():
    with pytest.raises(LawBroken, match=r"expected shape \[1\]\n  got      shape \[1, 1\]"):
        ADVANTAGE["shift"].check(GroupAdvantage(lambda r, g: r[:, None], "tensors"))


def test_a_function_that_remembers_breaks_the_law_and_ends_nothing():
    calls = []

    def alternating(reward, group, valid=None):
        calls.append(None)
        return mt.group_advantage(reward, group, valid=valid) * (1 + len(calls) % 7)

    with pytest.raises(LawBroken, match=r"^pure: "):
        ADVANTAGE["pure"].check(GroupAdvantage(alternating))
    with pytest.raises(LawBroken, match=r"it depends on earlier calls|expected "):
        ADVANTAGE["permutation"].check(GroupAdvantage(alternating))


def test_the_argument_that_changed_is_named():
    def moves_ids(reward, group):
        group -= group.min()
        return numpy_advantage(reward, group)

    with pytest.raises(
        LawBroken,
        match=r"expected group unchanged, \[1\]\n  got      group changed in place to \[0\]",
    ):
        ADVANTAGE["pure"].check(GroupAdvantage(moves_ids, "numpy"))


@pytest.mark.parametrize("kind", ["fusion", "selection"])
def test_fusion_and_selection_draw_moderate_ids_first(kind):
    largest = []

    def counts(*arguments, valid=None):
        group = arguments[-1]
        largest.append(int(group.abs().max()))
        if int(group.min()) < 0:
            raise ValueError("negative")
        same = group[:, None] == group
        if kind == "selection":
            reward = arguments[0]
            differs = same & valid[:, None] & valid & (reward[:, None] != reward)
            return differs.any(1)
        rewards, weights, _ = arguments
        return mt.fuse_advantages(rewards, weights, group, valid=valid)

    laws = laws_of(kind)
    subject = laws.subject(counts)
    names = [law.name for law in laws if law.skip(subject) is None]
    found = [r.broken.law for r in laws.results(subject, only=names, examples=20) if r.broken]
    assert found == ["relabeled-groups"]
    assert max(largest) <= 10**5


def test_milder_cases_come_first_and_a_law_that_they_break_draws_no_others():
    largest = []

    def counts(reward, group):
        largest.append(int(abs(group).max()))
        if group.min() < 0:
            raise ValueError("negative")
        return numpy_advantage(reward, group)

    with pytest.raises(LawBroken, match=r"group = \[-1\]"):
        ADVANTAGE["relabeled-groups"].check(GroupAdvantage(counts, "numpy"), examples=50)
    assert max(largest) <= 10**5


@pytest.mark.parametrize(
    ("result", "words"),
    [
        ("x", "'x'"),
        (None, "None"),
        (object(), "an object"),
        ({"a": 1}, "a dict"),
        (1j, "complex numbers"),
        (torch.tensor([1j]), "complex numbers"),
    ],
)
def test_what_is_no_array_breaks_the_law_and_is_refused_by_both_doors(result, words):
    subject = GroupAdvantage(lambda reward, group: result, "numpy")
    expected = "expected an array of real numbers"
    with pytest.raises(LawBroken, match=rf"{expected}\n  got      {words}\n"):
        ADVANTAGE["shift"].check(subject)
    with pytest.raises(TypeError, match=rf"^function: {expected}, got {words}$"):
        ADVANTAGE.check(subject)


def test_an_exception_is_shown_once_and_a_call_that_does_not_fit_is_refused():
    def fails(reward, group):
        raise TypeError("inside")

    with pytest.raises(
        AssertionError, match=r"^14 laws are broken\n14 laws break in one way: "
    ) as b:
        check_group_advantage(fails, signature="numpy", examples=1)
    assert str(b.value).count("the exception TypeError: inside") == 1
    assert "Why it matters" not in str(b.value)
    with pytest.raises(TypeError, match=r"^function: a call of the kind advantage raises the "):
        check_group_advantage(lambda: 0, signature="numpy", examples=1)


def test_what_a_law_does_with_a_result_ends_in_no_traceback():
    def backward_fails(velocity, target):
        loss = (velocity - target).square().mean(1)
        if loss.requires_grad:
            loss.register_hook(lambda _: 1 / 0)
        return loss

    subject = Loss(backward_fails, {"velocity": "latent", "target": "latent"}, ("velocity",))
    with pytest.raises(LawBroken, match=r"the exception ZeroDivisionError"):
        LOSS["finite"].check(subject, examples=1)
    solver = SolverStep(lambda *_: (torch.zeros(2, 2), "std"))
    with pytest.raises(LawBroken, match=r"expected a result that the law can read"):
        laws_of("solver")["finite"].check(solver, examples=1)


def test_a_loss_and_a_density_without_gradient_break_a_law():
    def detached(pred, target):
        return (pred.detach() - target).square().mean(1)

    subjects = {
        "loss": (Loss(detached, ROLES, ("pred",)), "finite"),
        "log-prob": (LogProb(lambda x, mean, std: (x - mean.detach())[:, 0]), "score"),
    }
    for kind, (subject, law) in some(subjects.items()):
        with pytest.raises(LawBroken, match=r"expected a gradient to \w+\n  got      no gradient"):
            laws_of(kind)[law].check(subject, examples=1)


def test_a_required_mask_is_always_passed_and_an_optional_one_where_it_says_something():
    masks = []

    def required(reward, group, valid):
        masks.append(valid)
        return numpy_advantage(reward, group, valid)

    check_group_advantage(required, signature="numpy", only=["shift", "permutation"], examples=3)
    assert masks
    assert all(mask.all() for mask in some(masks))


def test_torch_refusals_count_as_refusals():
    def ints_refused(reward, group, valid=None):
        reward.mean()  # RuntimeError for integers
        return mt.group_advantage(reward, group, valid=valid)

    def asserts(reward, group):
        assert reward.dtype.kind == "f"
        return numpy_advantage(reward, group)

    ADVANTAGE["whole-numbers"].check(GroupAdvantage(ints_refused), examples=10)
    ADVANTAGE["whole-numbers"].check(GroupAdvantage(asserts, "numpy"), examples=10)


def test_long_lists_are_shortened_and_the_pair_is_named():
    def first_eight(x):
        return (x - x[:8].mean()) / (x[:8].std() + 1e-4) if len(x) > 8 else 0 * x

    def advantage(reward, group):
        out = np.zeros(len(reward))
        for name in np.unique(group):
            out[group == name] = first_eight(reward[group == name])
        return out

    with pytest.raises(LawBroken, match=r"\(\d\d in all\)") as broken:
        ADVANTAGE["large-groups"].check(GroupAdvantage(advantage, "numpy"), examples=20)
    assert len(broken.value.case["reward"]) >= 16
    assert re.search(r"expected advantages of group \d that add up to 0\n", str(broken.value))
    with pytest.raises(
        LawBroken, match=r"  compared = entries \d and \d, of group -?\d+\n"
    ) as size:
        ADVANTAGE["size"].check(GroupAdvantage(lambda r, g: 2 * numpy_advantage(r, g), "numpy"))
    assert re.search(
        r"differ by -2: 0.0 - 1.0, over a std \(group, ddof=0\) of 0.5", str(size.value)
    )


def test_the_first_wrong_entry_and_its_group_are_named():
    """The message shows eight of 64 entries: the wrong one need not be among them."""

    def ninth_of_a_group_raw(reward, group):
        out = numpy_advantage(reward, group)
        for name in np.unique(group):
            members = np.flatnonzero(group == name)[8:9]
            out[members] = reward[members] + 9
        return out

    def third_row_wrong(score, turn_mask):
        out = torch.where(turn_mask, score, 0)
        return out + torch.where(turn_mask, 0, 1) * (torch.arange(len(score)) == 2)[:, None]

    subject = GroupAdvantage(ninth_of_a_group_raw, "numpy", float32=True)
    with pytest.raises(LawBroken) as broken:
        ADVANTAGE["large-groups"].check(subject, examples=5)
    assert "first wrong" not in str(broken.value)  # the sum is
    reward, group = broken.value.case["reward"], broken.value.case["group"]
    name = int(group[broken.value.wrong][0])
    members = (group == name).nonzero()[:, 0].tolist()
    shown = ", ".join(map(str, members[:6]))
    assert f"\n  members of group {name}: entries [{shown}, ..., " in str(broken.value)
    assert f"; reward [{reward[members[0]].item()}, " in str(broken.value)
    with pytest.raises(LawBroken) as broken:
        laws_of("credit")["padding-is-zero"].check(TurnCreditFunction(third_row_wrong))
    assert "\n  first wrong: entry [2, 1]: got 1.0\n" in str(broken.value)
    case = {"group": torch.tensor([5, 7, 5]), "reward": torch.tensor([1.0, 2.0, 3.0])}
    with pytest.raises(LawBroken) as broken:
        expect_close(torch.tensor([0.0, 0.0, 1.0]), torch.zeros(3), case, tolerance=0)
    assert (
        "\n  first wrong: entry 2 of group 5: expected 0.0, got 1.0\n"
        "  members of group 5: entries [0, 2]; reward [1.0, 3.0] (float32)"
    ) in str(broken.value)


def test_every_law_names_options_of_its_own_kind():
    """As the last line of its report, and where it is skipped."""
    for kind, laws in some(KINDS.items()):
        known = {f"--{x.name.replace('_', '-')}" for x in fields(laws.subject)} | {"--without"}
        for law in some(laws):
            named = set(re.findall(r"--[\w-]+", law.switch))
            assert {x.replace("--no-", "--") for x in named} <= known, (kind, law.name)
            assert law.switch.endswith(f"out: --without {law.name}")


def test_a_batch_may_have_no_valid_member():
    for size in some((1, 5)):
        lost = find(
            reward_batches(), lambda b, n=size: len(b.valid) >= n and not b.valid.any(),
            settings=FIRST,
        )  # fmt: skip
        assert not lost.valid.any()

    def lost_group(batch):
        return [bool(batch.valid[batch.group == g].any()) for g in set(batch.group.tolist())]

    assert find(reward_batches(), lambda b: {*lost_group(b)} == {True, False}, settings=FIRST)


def test_a_function_may_refuse_small_groups_if_it_is_announced():
    def refuses_one(reward, group):
        if min((group == name).sum() for name in group) < 2:
            raise ValueError("a group needs two members")
        return numpy_advantage(reward, group)

    with pytest.raises(LawBroken, match="the exception ValueError: a group needs two"):
        check_group_advantage(refuses_one, signature="numpy", only="shift", examples=30)
    check_group_advantage(refuses_one, signature="numpy", min_members=2, examples=10)


def test_textbook_losses_of_others_pass():
    def ppo(log_prob, old_log_prob, advantage, mask):
        ratio, advantage = (log_prob - old_log_prob).clamp(-20, 20).exp(), advantage.clamp(-5, 5)
        loss = -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        return torch.where(mask, loss, 0)

    without = ["compiled-equals-eager", "mask-equals-deletion"]
    check_policy_loss(ppo, valid="mask", examples=10, without=without)

    def plain(log_prob, old_log_prob, advantage):
        ratio = torch.exp(log_prob - old_log_prob)
        return torch.max(-ratio * advantage, -ratio.clamp(0.8, 1.2) * advantage).mean()

    with pytest.raises(LawBroken, match=r"^far-ratios: "):
        check_policy_loss(plain, reduction="mean", examples=20, without=without[0])


def reinforce(log_prob, old_log_prob, advantage):
    return -advantage * log_prob


def reinforce_by_a_ratio_of_1(log_prob, old_log_prob, advantage):
    return -advantage * (log_prob - log_prob.detach()).exp()


def cispo(log_prob, old_log_prob, advantage):
    ratio = (log_prob - old_log_prob).clamp(-20, 20).exp().clamp(0.8, 1.2)
    return -ratio.detach() * advantage * log_prob


@pytest.mark.parametrize("function", [reinforce, reinforce_by_a_ratio_of_1, cispo])
def test_losses_of_other_forms_leave_out_the_laws_that_the_page_names(function):
    row = next(x for x in PAGE.splitlines() if x.startswith(f"| `{function.__name__}` |"))
    without = re.findall(r"`--without ([\w -]+)`", row)[0].split()
    clips = {} if "--clip-low none" not in row else {"clip_low": None, "clip_high": None}
    subject = PolicyLoss(function, **clips)
    laws = POLICY_LOSS.chosen(without=["compiled-equals-eager"])
    found = {
        result.about.name
        for result in POLICY_LOSS.results(subject, only=[law.name for law in laws], examples=30)
        if result.broken is not None
    }
    assert found == set(without)


def masked_by_product(pred, target, mask):
    return (pred - target).square().mean(1) * mask


ROLES = {"pred": "latent", "target": "latent"}
OF_THE_CALL = [
    ("kl", Density(lambda mean, other, std: mean[:, 0]), "divergence", "reference_mean = "),
    (
        "credit",
        TurnCreditFunction(lambda reward, turn_mask: reward),
        "padding-is-zero",
        "reward = ",
    ),
    (
        "loss",
        Loss(masked_by_product, ROLES, ("pred",), valid="mask"),
        "mask-equals-deletion",
        "mask =",
    ),
]


@pytest.mark.parametrize(("kind", "subject", "law", "name"), OF_THE_CALL)
def test_arguments_are_printed_under_the_names_of_the_call(kind, subject, law, name):
    with pytest.raises(LawBroken, match=f"\n  {name}"):
        laws_of(kind)[law].check(subject, examples=20)


def test_a_mean_of_torch_has_second_derivatives():
    """Torch has no forward derivative of mse_loss's backward: two backward passes are enough."""
    roles = {"pred": "latent", "target": "latent"}
    subject = Loss(
        lambda pred, target: torch.nn.functional.mse_loss(pred, target), roles, ("pred",), "mean"
    )
    LOSS["second-derivatives"].check(subject, examples=5)


# bad usage


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: GroupAdvantage(3), TypeError, "function: expected a callable, got int"),
        (
            lambda: GroupAdvantage(sum, std="all"),
            ValueError,
            "std: expected one of group, batch, none, got 'all'",
        ),
        (
            lambda: GroupAdvantage(sum, min_members=5),
            ValueError,
            "min_members: expected an integer in 1..4, got 5",
        ),
        (
            lambda: PolicyLoss(sum, reduction="sum"),
            ValueError,
            "reduction: expected one of none, mean, got 'sum'",
        ),
        (
            lambda: PolicyLoss(sum, clip_low=1.5),
            ValueError,
            "clip_low: expected a number in [0, 1), or None, got 1.5",
        ),
        (
            lambda: PolicyLoss(sum, clip_high=-1.0),
            ValueError,
            "clip_high: expected a number >= 0, or None, got -1.0",
        ),
        (
            lambda: PolicyLoss(sum, clip_low=None),
            ValueError,
            "clip_low, clip_high: expected two numbers, or None for both",
        ),
        (
            lambda: ADVANTAGE.chosen("shift", without=["shift"]),
            ValueError,
            "only, without: expected at least one law that is left, got none",
        ),
        (
            lambda: GroupAdvantage(sum, ddof=2),
            ValueError,
            "ddof: expected an integer in 0..1, got 2",
        ),
        (
            lambda: GroupAdvantage(sum, eps=-1.0),
            ValueError,
            "eps: expected a number >= 0, got -1.0",
        ),
        (
            lambda: GroupAdvantage(sum, "grpo"),
            ValueError,
            f"signature: expected one of {', '.join(SIGNATURES)}, or a callable "
            "adapter, got 'grpo'",
        ),
        (
            lambda: laws_of("rewards"),
            ValueError,
            f"kind: expected one of {', '.join(KINDS)}, got 'rewards'",
        ),
        (
            lambda: ADVANTAGE["sum"],
            ValueError,
            f"law: expected one of {', '.join(law.name for law in ADVANTAGE)}, got 'sum'",
        ),
        (
            lambda: check_group_advantage(mt.group_advantage, examples=0),
            ValueError,
            "examples: expected an integer >= 1, got 0",
        ),
        (
            lambda: ADVANTAGE["no-gradient"].check(GroupAdvantage(numpy_advantage, "numpy")),
            ValueError,
            "no-gradient does not apply: the function takes no tensors",
        ),
        (
            lambda: Fusion(sum, level="both"),
            ValueError,
            "level: expected one of advantage, reward, got 'both'",
        ),
        (
            lambda: TurnCreditFunction(sum, reads="none"),
            ValueError,
            "reads: expected one of later, earlier, got 'none'",
        ),
        (
            lambda: Loss(sum, {"x": "image"}, ("x",)),
            ValueError,
            "inputs: expected roles latent, number, share, sigma, positive, log-ratio, "
            "got ['image']",
        ),
        (
            lambda: Loss(sum, {"x": "latent"}, ("y",)),
            ValueError,
            "trained: expected names in ['x'], got ('y',)",
        ),
        (
            lambda: Loss(sum, {"x": "latent"}, ("x",), reduction="sum"),
            ValueError,
            "reduction: expected one of none, mean, got 'sum'",
        ),
        (
            lambda: Density(sum, "none"),
            ValueError,
            "reduction: expected one of mean, sum, got 'none'",
        ),
        (
            lambda: SolverStep(sum, noise_level=-1.0),
            ValueError,
            "noise_level: expected a number >= 0, got -1.0",
        ),
        (
            lambda: Loss(sum, {"x": "latent"}, "x"),
            TypeError,
            "trained: expected a tuple of names, got 'x'; write ('x',)",
        ),
        (
            lambda: Loss(sum, {"x": "latent"}, ()),
            ValueError,
            "trained: expected names in ['x'], got none",
        ),
        (
            lambda: Loss(sum, {"x": "latent"}, ("x",), valid="x"),
            ValueError,
            "valid: expected a name other than those of the inputs, got 'x'",
        ),
        (
            lambda: PolicyLoss(sum, clip_high="0.2"),
            TypeError,
            "clip_high: expected a number >= 0, or None, got '0.2'",
        ),
        (
            lambda: Density(sum, tolerance=None),
            TypeError,
            "tolerance: expected a number >= 0, got None",
        ),
        (
            lambda: PolicyLoss(sum, detaches="yes"),
            TypeError,
            "detaches: expected True or False, got 'yes'",
        ),
        (
            lambda: check_group_advantage(mt.group_advantage, examples="5"),
            TypeError,
            "examples: expected an integer >= 1, got '5'",
        ),
        (
            lambda: check_group_advantage(mt.group_advantage, exmaples=5),
            TypeError,
            "options: expected some of signature, std, ddof, eps, zero, min_members, tolerance, "
            "detaches, float32, only, without, examples, seed, got 'exmaples'",
        ),
        (
            lambda: check_group_advantage(numpy_advantage, signature="numpy", only="no-gradient"),
            ValueError,
            "only, without: expected a law that applies, got no-gradient: the function takes no "
            "tensors",
        ),
        (
            lambda: TurnCreditFunction(sum, values=()),
            ValueError,
            "values: expected at least two different finite numbers, got ()",
        ),
        (
            lambda: TurnCreditFunction(sum, values=(0.0, np.nan, 1.0)),
            ValueError,
            "values: expected at least two different finite numbers, got (0.0, nan, 1.0)",
        ),
        (
            lambda: GroupAdvantage(Tiny),
            TypeError,
            "function: expected a function, got the class Tiny; pass an instance",
        ),
        (
            lambda: GaussianPolicy(0.0, 0.0),
            ValueError,
            "std: expected a finite number > 0, got 0.0",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=exactly(message)):
        call()


# signatures


async def asynchronous(reward, group):
    return reward


def generator(reward, group):
    yield from reward


@pytest.mark.parametrize(
    ("function", "words"),
    [(asynchronous, "returns a coroutine; wrap it"), (generator, "returns a generator; return a")],
)
def test_functions_that_return_no_result_of_their_own(function, words):
    with pytest.raises(TypeError, match=f"^function: expected a result, but .* {words}"):
        GroupAdvantage(function)


def by_tracker():
    class Tracker:
        def update(self, prompts, rewards):
            assert prompts.dtype.kind == "U"
            return numpy_advantage(rewards, np.unique(prompts, return_inverse=True)[1])

    return Tracker


def verl_like(token_level_rewards, response_mask, index):
    reward = token_level_rewards.sum(-1)
    group = torch.from_numpy(np.unique(index, return_inverse=True)[1])
    advantage = mt.group_advantage(reward, group)[:, None] * response_mask
    return advantage, advantage


def records(items):
    reward = torch.tensor([0.0 if x["reward"] is None else x["reward"] for x in items]).double()
    valid = torch.tensor([x["reward"] is not None for x in items])
    group = torch.tensor([x["group"] for x in items])
    for item, advantage in zip(items, mt.group_advantage(reward, group, valid=valid), strict=True):
        item["advantage"] = float(advantage)


def table(reward):
    prompts, samples = reward.shape
    group = torch.arange(prompts, device="cpu")[:, None].expand(prompts, samples).reshape(-1)
    return mt.group_advantage(reward.flatten(), group).reshape(reward.shape)


def keyword_adapter(function, reward, group, valid):
    return function(rewards=reward, prompt_ids=group, ok=valid)


def with_keywords(*, rewards, prompt_ids, ok):
    return mt.group_advantage(rewards, prompt_ids, valid=ok)


@pytest.mark.parametrize(
    ("function", "signature"),
    [
        (mt.group_advantage, "mteditflow"),
        (lambda reward, group: mt.group_advantage(reward, group), "tensors"),
        (numpy_advantage, "numpy"),
        (lambda reward, group: numpy_advantage(reward, group, np.isfinite(reward)), "nan"),
        (records, "records"),
        (lambda items: [numpy_advantage(*columns(items))[i] for i in range(len(items))], "records"),
        (by_tracker(), "flow-grpo"),
        (verl_like, "verl"),
        (table, "prompts-samples"),
        (with_keywords, keyword_adapter),
        (with_keywords, Signature(keyword_adapter, "by keywords", lost=True, tensors=True)),
    ],
)
def test_a_right_function_keeps_every_law_under_each_signature(function, signature):
    check_group_advantage(function, signature=signature, examples=8)


def columns(items):
    reward = np.array([np.nan if x["reward"] is None else x["reward"] for x in items], dtype=float)
    return np.nan_to_num(reward), np.array([x["group"] for x in items]), np.isfinite(reward)


def test_lost_rewards_are_passed_where_the_signature_has_them():
    applied = {
        name: {
            law.name for law in ADVANTAGE if law.skip(GroupAdvantage(numpy_advantage, name)) is None
        }
        for name in ("numpy", "flow-grpo")
    }
    assert applied["numpy"] - applied["flow-grpo"] == {"mask-equals-deletion", "invalid-never-read"}
    without = GroupAdvantage(lambda reward, group: reward, "numpy")
    assert not without.convention.lost


# strategies


def test_strategies_keep_what_they_promise():
    @settings(max_examples=100, database=None, derandomize=True)
    @given(st.data())
    def kept(data):
        batch = data.draw(reward_batches(constant=False, min_members=2, max_members=3))
        for name in some(set(batch.group.tolist())):
            members = batch.reward[batch.group == name]
            assert 2 <= len(members) <= 3
            assert members.min() < members.max()
        batch = data.draw(reward_batches(ragged=False, lost=False))
        assert len({batch.group.tolist().count(name) for name in batch.group.tolist()}) == 1
        assert batch.valid.all()
        chains = data.draw(turn_batches(values=(1.0, 5.0)))
        assert set(chains.score.flatten().tolist()) <= {1.0, 5.0}
        assert chains.turn_mask[:, 0].all()
        assert (chains.turn_mask.long().diff(dim=1) <= 0).all()
        grid = data.draw(sigma_grids(max_steps=5))
        assert grid[0] == 1
        assert grid[-1] == 0
        assert 2 <= len(grid) <= 6
        assert (grid.diff() < 0).all()

    kept()


@pytest.mark.parametrize("dtype", SIGNATURES["mteditflow"].ids, ids=str)
def test_ids_reach_the_ends_of_their_dtype(dtype):
    end = torch.iinfo(dtype).max
    assert find(group_ids(dtype=dtype), lambda ids: end in ids and end - 1 in ids, settings=FIRST)
    assert find(group_ids(dtype=dtype), lambda ids: len(ids) > 1, settings=SAME) == [0, 1]


def test_cases_shrink_to_what_a_person_reads():
    batch = find(
        reward_batches(number=signs),
        lambda b: len(b.reward) > 2 and not bool(b.valid.all()),
        settings=SAME,
    )
    assert batch.reward.tolist() == [0] * len(batch.reward)
    assert len(batch.reward) - batch.valid.sum() == 1


# closed forms


@pytest.mark.parametrize("sigma", [0.0, 0.3, 1.0])
def test_the_gaussian_flow_is_what_samples_of_the_path_are(sigma):
    flow, random = GaussianFlow(1.5, 0.5), torch.Generator().manual_seed(0)
    noise, clean = torch.randn(2, 400_000, 1, generator=random, dtype=torch.float64)
    clean = flow.mean + flow.std * clean
    x_t = (1 - sigma) * clean + sigma * noise
    mean, variance = flow.marginal(sigma)
    assert x_t.mean().item() == pytest.approx(mean, abs=0.01)
    assert x_t.var().item() == pytest.approx(variance, abs=0.01)
    # the velocity is the regression of noise - clean on x_t: its residual is uncorrelated with x_t
    residual = noise - clean - flow.velocity(x_t, sigma)
    assert residual.mean().item() == pytest.approx(0, abs=0.01)
    assert (residual * (x_t - mean)).mean().item() == pytest.approx(0, abs=0.01)


def test_the_quadrature_of_a_gaussian_policy_is_exact():
    policy = GaussianPolicy(1.5, 0.5)
    action, weight = policy.quadrature()
    moments = [float((weight * (action - 1.5) ** k).sum()) for k in (0, 1, 2, 4)]
    assert moments == pytest.approx([1, 0, 0.25, 3 * 0.0625], abs=1e-12)
    score = (action - 1.5) / 0.25
    assert float((weight * score * -0.5 * (action - 3.0) ** 2).sum()) == pytest.approx(1.5)


def test_a_mean_over_rows_is_checked_as_one():
    def mean_loss(log_prob, old_log_prob, advantage):
        return mt.clipped_surrogate_loss(
            log_prob, old_log_prob, advantage, clip_low=0.2, clip_high=0.2
        ).mean()

    check_policy_loss(
        mean_loss, reduction="mean", valid=None, examples=5, without=["compiled-equals-eager"]
    )
    with pytest.raises(LawBroken, match=r"^on-policy-gradient: "):
        check_policy_loss(
            lambda *x: 2 * mean_loss(*x), reduction="mean", valid=None, only=["on-policy-gradient"]
        )
    subject = PolicyLoss(mean_loss, "mean", None).loss
    assert LOSS["slice-equals-whole"].skip(subject) == "--reduction: the loss is a mean over rows"


# models


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.base = torch.nn.Linear(2, 2)
        self.adapter = None

    def velocity(self):
        out = self.base(torch.ones(1, 2))
        return out if self.adapter is None else out + self.adapter(torch.ones(1, 2))

    def add(self, *, start=0.0, frozen=True, trained=True, moved=0.0, bias=False):
        self.adapter = torch.nn.Linear(2, 2, bias=False).requires_grad_(trained)
        torch.nn.init.constant_(self.adapter.weight, start - moved)
        self.base.requires_grad_(not frozen)
        self.base.weight.data += moved
        self.base.bias.requires_grad_(bias or not frozen)

    def reference(self):
        return self.base(torch.ones(1, 2))


def test_adapters():
    model = Tiny()
    check_adapter(
        model,
        model.velocity,
        model.add,
        parameters=lambda: model.adapter.parameters(),
        reference=model.reference,
    )
    assert torch.equal(model.velocity(), model.reference())
    for options, wanted in (
        ({"start": 0.1}, "adapter-starts-as-no-op: "),
        ({"trained": False}, "expected parameters that need a gradient\n  got      none"),
    ):
        model = Tiny()
        with pytest.raises(LawBroken, match=wanted):
            check_adapter(model, model.velocity, lambda m=model, o=options: m.add(**o))


def test_an_adapter_that_changes_the_base_is_found():
    """By its initialization as PiSSA's, which velocities show up to rounding alone, or later."""
    for options in ({"moved": 0.5}, {"bias": True}):
        model, start = Tiny(), torch.get_rng_state()
        given = (model, model.velocity, lambda m=model, o=options: m.add(**o))
        check_adapter(*given, tolerance=1e-5)
        model.adapter = None
        torch.set_rng_state(start)
        with pytest.raises(LawBroken, match=r"^reference-is-the-base-model: "):
            check_adapter(*given, reference=model.reference, tolerance=1e-5)


@pytest.mark.parametrize(
    ("listed", "wrong"),
    [
        (lambda m: [m.adapter.weight] * 2, "'adapter.weight': '2 times'"),
        (lambda m: [], "'adapter.weight': '0 times'"),
        (lambda m: [m.adapter.weight, m.base.bias], "'one that is not trained': '1 times'"),
    ],
)
def test_an_optimizer_that_gets_other_parameters_is_found(listed, wrong):
    model = Tiny()
    with pytest.raises(LawBroken, match=rf"(?s)^parameters-are-the-trained-ones: .*{wrong}"):
        check_adapter(model, model.velocity, model.add, parameters=lambda: listed(model))


def test_an_adapter_that_does_nothing_when_moved_is_found():
    """A gradient where it starts, and none of its effect after: its layer is not called."""
    model = Tiny()
    calls = []

    def velocity():
        calls.append(1)
        return model.velocity() if len(calls) < 3 else model.reference()

    with pytest.raises(LawBroken, match="expected another velocity\n"):
        check_adapter(model, velocity, model.add, reference=model.reference)


def test_an_adapter_keeps_its_weights_if_a_function_raises():
    model = Tiny()
    calls = []

    def reference():
        calls.append(1)
        if len(calls) == 2:  # while the adapter is moved
            raise RuntimeError("out of memory")
        return model.reference()

    with pytest.raises(RuntimeError, match="out of memory"):
        check_adapter(model, model.velocity, model.add, reference=reference)
    assert not model.adapter.weight.any()


def test_a_scale_lost_elsewhere_is_found():
    """Adapter of scale 4 in a file that says nothing of it: exact here, a quarter elsewhere."""
    weight, held = torch.nn.Parameter(torch.zeros(2)), {}
    given = (
        lambda: 4 * weight,
        lambda: torch.nn.init.normal_(weight),
        lambda: held.update(weight=weight.detach().clone()),
        lambda: weight.data.copy_(held["weight"]),
    )
    check_saved(*given, elsewhere=lambda: 4 * held["weight"])
    with pytest.raises(LawBroken, match=r"(?s)^saved-file-loads-to-the-same-velocity: .*elsewhere"):
        check_saved(*given, elsewhere=lambda: held["weight"])


def test_saved_files():
    model = Tiny()
    held = {}

    def change():
        torch.nn.init.normal_(model.base.weight)

    def save(prefix=""):
        held.clear()
        held.update({prefix + key: x.clone() for key, x in model.state_dict().items()})

    def load():
        model.load_state_dict(held, strict=False)

    check_saved(model.velocity, change, save, load)
    with pytest.raises(LawBroken, match=r"^saved-file-loads-to-the-same-velocity: "):
        check_saved(model.velocity, change, lambda: save("transformer."), load)
    with pytest.raises(LawBroken, match="expected another velocity after the change"):
        check_saved(model.velocity, lambda: None, save, load)


def test_replay():
    old = torch.tensor([-1.0, -2.0])
    check_replay(lambda: old.clone().requires_grad_(), old)
    for replayed, wanted in (
        (lambda: old.bfloat16().float().mul(1.0001).requires_grad_(), "expected ratios of 1"),
        (lambda: old.clone(), "a replay without gradient"),
        (lambda: torch.full_like(old, torch.nan).requires_grad_(), "expected ratios of 1"),
        (lambda: old[:1].clone().requires_grad_(), r"shape \[2\]"),
    ):
        with pytest.raises(LawBroken, match=wanted):
            check_replay(replayed, old)
