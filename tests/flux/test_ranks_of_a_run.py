"""The same update whatever the number of ranks, replicated or sharded, groups whole or split."""

import functools

import pytest
import torch

from tests.flux.worlds import options, run, run_as_a_user, weights
from tests.loops import some

ROUNDS = 2  # of two updates each


def flat(output, name):
    tensors = weights(output, name, ROUNDS)
    return torch.cat([tensors[key].double().flatten() for key in sorted(tensors)])


UNEVEN = (  # ranks train different numbers of rows, or none in a minibatch
    *("--rewards.credit", "until_failure", "--rewards.groups", "informative"),
    *("--training.batch", 2),
)
NAMES = ("current", "old", "optimizer")
WAYS = {
    "replicated": (),
    "split groups": ("--data.split-groups",),
    "sharded": ("--model.shard",),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "uneven", "ways"),
    [
        ("nft", UNEVEN, ("replicated", "sharded")),
        ("grpo", (), ("split groups",)),
        pytest.param("nft", (), ("replicated", "split groups", "sharded"), marks=pytest.mark.long),
        pytest.param("grpo", UNEVEN, ("replicated", "sharded"), marks=pytest.mark.long),
    ],
)
def test_one_process_and_two_ranks_end_alike(world, tmp_path, objective, uneven, ways):
    more = [*uneven, *(("--objective.stochastic-steps", 2) if objective == "grpo" else ())]

    def ended(name, ranks, *extra):
        short = ("--training.rounds", ROUNDS, "--data.groups", 2)
        if name != "replicated":  # evaluations change no weights, and one run has them
            short += ("--data.held-out", "None")
        given = options(world, tmp_path / name, *short, *more, *extra, objective=objective)
        (run_as_a_user if name == "replicated" else run)(*given, ranks=ranks)
        return tmp_path / name

    @functools.cache
    def rounding():
        """Differences by rounding when one process alone puts rows into other micro-batches."""
        regrouped = ended("regrouped", 1, "--training.batch", 1 if uneven else 4)
        return {name: difference(regrouped, name) for name in NAMES}

    def difference(output, name):
        ours, theirs = flat(alone, name), flat(output, name)
        return float((ours - theirs).norm() / ours.norm())

    alone = ended("alone", 1)
    assert flat(alone, "current").norm() > 0
    for how in some(ways):
        output = ended(how, 2, *WAYS[how])
        for name in NAMES:
            error = difference(output, name)
            # Shards sum gradients in another order; steps of Adam enlarge what that rounds.
            allowed = 1e-5 if how == "sharded" else 1e-6
            # So do other micro-batches on one process, by how much is the processor's kernels'.
            assert error <= allowed or error <= 2 * rounding()[name], f"{how}, {name}: {error:.1e}"
