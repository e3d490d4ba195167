"""The same update whatever the number of ranks, replicated or sharded, groups whole or split."""

import functools
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.flux.worlds import options, run, run_as_a_user, weights
from tests.loops import some

ROUNDS = 2  # of two updates each
FIRST = Path("checkpoints", "round-000001")


def flat(output, name):
    tensors = weights(output, name, ROUNDS)
    return torch.cat([tensors[key].double().flatten() for key in sorted(tensors)])


UNEVEN = (  # ranks train different numbers of rows, or none in a minibatch
    *("--rewards.credit", "until_failure", "--rewards.groups", "informative"),
    *("--training.batch", 2),
)
FILLED = (*UNEVEN, "--data.extra-groups", 3, "--rewards.regions")  # and tokens have their own
NAMES = ("current", "old", "optimizer")
WAYS = {
    "replicated": (),
    "split groups": ("--data.split-groups",),
    "sharded": ("--model.shard", "fsdp2"),
    "zero3": ("--model.shard", "zero3"),
}
needs_zero = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs mteditflow[zero]")
ZERO = Path(__file__).with_name("over_gloo_alone.py")
LORA = "pytorch_lora_weights.safetensors"


def exported(output):
    """Weights of the LoRA that the last checkpoint exports."""
    return load_file(output / "checkpoints" / f"round-{ROUNDS:06d}" / "lora" / LORA)


@pytest.fixture(scope="module")
def arguments(world):
    """Command lines of short runs by objective, rows of ranks and name."""

    def of(objective, uneven, name):
        short = ("--training.rounds", ROUNDS, "--data.groups", 2, "--output.checkpoint-every", 1)
        if name != "replicated":  # evaluations change no weights, and one run has them
            short += ("--data.held-out", "None")
        if objective == "grpo":
            short += ("--objective.stochastic-steps", 2)
        given = {"objective": objective}
        return lambda root, *more: options(world, root / name, *short, *uneven, *more, **given)

    return of


@pytest.fixture(scope="module")
def one_process(arguments, tmp_path_factory):
    """Runs of one process, by objective and rows of ranks."""

    @functools.cache
    def ended(objective, uneven):
        root = tmp_path_factory.mktemp("alone")
        run(*arguments(objective, uneven, "alone")(root))
        return root / "alone"

    return ended


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "uneven", "ways"),
    [
        ("nft", UNEVEN, ("replicated", "sharded")),
        pytest.param("nft", UNEVEN, ("zero3",), marks=needs_zero),
        ("grpo", (), ("split groups",)),
        pytest.param("nft", FILLED, ("replicated", "split groups"), marks=pytest.mark.long),
        pytest.param("nft", (), ("replicated", "split groups", "sharded"), marks=pytest.mark.long),
        pytest.param("grpo", UNEVEN, ("replicated", "sharded"), marks=pytest.mark.long),
    ],
)
def test_one_process_and_two_ranks_end_alike(
    arguments, one_process, tmp_path, objective, uneven, ways
):
    def ended(name, ranks, *extra):
        more = arguments(objective, uneven, name)
        if name == "zero3":  # goes on from the first round of one process
            shutil.copytree(alone / FIRST, tmp_path / name / FIRST)
            run(*more(tmp_path, *extra), ranks=ranks, script=ZERO)
        else:
            (run_as_a_user if name == "replicated" else run)(*more(tmp_path, *extra), ranks=ranks)
        return tmp_path / name

    @functools.cache
    def rounding():
        """Differences by rounding when one process alone puts rows into other micro-batches."""
        regrouped = ended("regrouped", 1, "--training.batch", 1 if uneven else 4)
        return {name: difference(regrouped, name) for name in NAMES}

    def difference(output, name):
        ours, theirs = flat(alone, name), flat(output, name)
        return float((ours - theirs).norm() / ours.norm())

    alone = one_process(objective, uneven)
    assert flat(alone, "current").norm() > 0
    for how in some(ways):
        output = ended(how, 2, *WAYS[how])
        for name in NAMES:
            error = difference(output, name)
            # Shards sum gradients in another order; steps of Adam enlarge what that rounds.
            allowed = 1e-5 if how == "sharded" else 1e-6
            # So do other micro-batches on one process, by how much is the processor's kernels'.
            assert error <= allowed or error <= 2 * rounding()[name], f"{how}, {name}: {error:.1e}"
        ours, theirs = (exported(folder) for folder in (alone, output))
        assert {key: x.shape for key, x in ours.items()} == {k: x.shape for k, x in theirs.items()}
