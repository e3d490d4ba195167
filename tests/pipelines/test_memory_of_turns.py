"""Memory of the device does not grow with the number of turns: rollout and update.

There is no device here, so bytes are counted as on one: every storage that an operation makes is
the device's until its last reference is gone, but for what the recorder keeps, which it moves to
the host, and what is computed from that alone.
"""

import gc
from contextlib import contextmanager

import pytest
import torch
from mteditflow_examples.shapes.editor import TEXT_TOKENS, load_editor
from PIL import Image
from torch.utils._pytree import tree_leaves

from mteditflow.budget.tracking import PeakMemory
from mteditflow.objectives import GRPO, NFT, RoundKey, Sampling
from mteditflow.pipelines import Editor, LoraPolicies, Rollout, RolloutVelocity
from mteditflow.pipelines.conditioning import map_tensors
from mteditflow.pipelines.turn import Turn
from tests.loops import some

TURNS, B, STEPS = (2, 8), 3, 4
PLAIN = Sampling()
INSTRUCTIONS = ["Add a red circle", "Remove the blue square", "Change the background to gray"]


class DeviceMemory(PeakMemory):
    """Bytes alive on a device, without those that lie on the host.

    Attributes:
        host: bytes that were moved to the host.
    """

    def __init__(self, ignored):
        super().__init__(ignored, block=1)
        self.host = 0
        self._there = {}

    def move(self, x):
        """Take a tensor for one of the host."""
        storage = x.untyped_storage()
        if storage._cdata in self._sizes:
            self._there[storage._cdata] = storage  # held, so that no address returns
            self.host += storage.nbytes()
            self._released(storage._cdata)
            self._addresses.add(storage._cdata)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if given and all(x.untyped_storage()._cdata in self._there for x in given):
            for x in tree_leaves(result):
                if isinstance(x, torch.Tensor):
                    self.move(x)
        return result


@contextmanager
def metered(editor, monkeypatch, *, keeps_on_device=False):
    """A meter; what the recorder keeps is on the host unless it is to stay on the device."""
    memory, keep = DeviceMemory(weights_of(editor)), Turn._keep

    def kept(turn, x):
        moved = keep(turn, x)
        memory.move(moved)
        return moved

    with monkeypatch.context() as patched:
        if not keeps_on_device:
            patched.setattr(Turn, "_keep", kept)
        with memory:
            yield memory


@pytest.fixture(scope="module")
def editor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kontext")
    load_editor("kontext").save_pretrained(folder)
    side = {"height": 12, "width": 12, "max_sequence_length": TEXT_TOKENS, "guidance_scale": 1.0}
    return Editor.load(folder, call=side | {"num_inference_steps": STEPS})


@pytest.fixture(scope="module")
def policies(editor):
    return LoraPolicies(editor.transformer, editor.lora(rank=2, alpha=2), seed=0)


def rolled_out(editor, turns, how=PLAIN):
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (B, 12, 12, 3), generator=random, dtype=torch.uint8).numpy()
    texts = [[INSTRUCTIONS[n % 3] for n in range(turns)]] * B
    parts = editor.roll_out(
        [Image.fromarray(x) for x in pixels],
        texts,
        generators=[torch.Generator().manual_seed(b) for b in range(B)],
        group=torch.arange(B),
        batch=B,
        solver=how.solver,
        stochastic_steps=how.stochastic_steps,
        verify=False,
    )
    return Rollout.concatenate([part.rollout for part in parts])


def weights_of(editor):
    """Tensors that are on the device before anything is sampled."""
    modules = editor.pipeline.transformer, editor.pipeline.vae
    return [x for part in modules for x in (*part.parameters(), *part.buffers())]


def kept_by(rollout):
    """Tensors of a rollout."""
    tensors = [*rollout.trajectory._tensors().values(), rollout.index]
    map_tensors(rollout.conditioning, lambda x: tensors.append(x) or x)
    return tensors


def record_size(rollout):
    """Bytes of what a rollout keeps, each tensor once."""
    return sum({x.data_ptr(): x.untyped_storage().nbytes() for x in kept_by(rollout)}.values())


@pytest.fixture
def uncollected():
    """Python's collector at rest: it counts objects and does not see a device fill up."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("uncollected")
def test_a_rollout_takes_the_device_as_much_for_eight_turns_as_for_two(editor, monkeypatch):
    """Its peak to the byte; what is left after it are grids and masks of the record."""
    rolled_out(editor, 3)  # what is made once, such as embeddings of the three instructions
    peaks, hosts = [], []
    for turns in some(TURNS):
        with metered(editor, monkeypatch) as memory:
            kept = rolled_out(editor, turns)
            assert memory.now < 1000
        peaks.append(memory.peak)
        hosts.append(record_size(kept))
        assert kept.turn_mask.shape == (B, turns)
    assert peaks[0] == peaks[1] > 100_000
    assert hosts[1] > 3 * hosts[0] > 50_000


@pytest.mark.usefixtures("uncollected")
def test_the_meter_sees_what_a_turn_leaves_on_the_device(editor, monkeypatch):
    """With records that stay there eight turns take more, by what six more of them are."""
    rolled_out(editor, 3)
    peaks, sizes = [], []
    for turns in some(TURNS):
        with metered(editor, monkeypatch, keeps_on_device=True) as memory:
            sizes.append(record_size(rolled_out(editor, turns)))
        peaks.append(memory.peak)
    assert peaks[1] - peaks[0] > 0.9 * (sizes[1] - sizes[0])


@pytest.mark.parametrize(
    "objective",
    [NFT(kl_coef=0.1), GRPO(noise_level=0.7, stochastic_steps=3, kl_coef=0.1)],
    ids=lambda x: type(x).__name__,
)
def test_a_micro_batch_takes_as_much_of_eight_turns_as_of_two(editor, policies, objective):
    how, peaks = objective.sampling(0, steps=STEPS), []
    for turns in some(TURNS):
        rollout = rolled_out(editor, turns, how)
        velocity = RolloutVelocity(policies, rollout)
        advantage = torch.linspace(-1, 1, B)[:, None].expand(-1, turns) + 0.1
        (units,) = objective.units(rollout, advantage, key=RoundKey(0, 0))
        part = units[units.rows[:, 0, 1] < TURNS[0]].split(3)[0]  # the same rows of either
        gradients = [torch.zeros_like(weight) for weight in policies.parameters()]
        for weight, gradient in zip(policies.parameters(), gradients, strict=True):
            weight.grad = gradient
        there = [*gradients, *weights_of(editor), *kept_by(rollout)]
        with PeakMemory(there) as memory:
            output = objective(velocity, rollout, part)
            (output.loss.sum() / part.count).backward()
            del output
        peaks.append(memory.peak)
    assert peaks[0] == peaks[1] > 0
