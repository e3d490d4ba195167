"""Sizes of a run that determine its costs, and the memory of its phases on one GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from mteditflow._checks import check_choice, check_count, check_number
from mteditflow.budget.costs import Costs, ModelCosts
from mteditflow.budget.passes import Passes

GIB = 2**30
Quantize = Literal["none", "int8", "nf4"]
Verdict = Literal["fits", "tight", "no"]

LARGEST = 10_000.0  # GiB of a GPU, at most
CONTEXT = 0.6  # GiB of the CUDA context and its libraries
USABLE = 0.95  # share of the rest that is usable in spite of fragmentation
COMFORTABLE = 0.9  # share of the usable memory below which a run fits
VAE_MARGIN = 1.2  # for copies inside convolution kernels, which the prediction does not include
# Bytes of a packed weight. int8: a scale per row; nf4: 4 bits, and a float32 scale per 64 weights.
BYTES = {"int8": 1.001, "nf4": 0.5 + 4 / 64}


@dataclass(frozen=True)
class Sampler:
    """Sampler beside the model in training, or on top of it.

    Attributes:
        sibling: costs of a row of the sibling's transformer; None: the trained model samples.
        sets: sets of adapters on the sibling, of the policies' rank.
        lora: number of float32 weights of a LoRA for few steps; 0: there is none.
        lora_forward: FLOPs of this LoRA in a forward pass of one branch.
    """

    sibling: Costs | None = None
    sets: int = 0
    lora: int = 0
    lora_forward: float = 0.0


@dataclass(frozen=True)
class Plan:
    """Sizes of a run.

    Attributes:
        costs: costs of the model's parts.
        passes: rows that an update runs for each trajectory.
        branches: forward passes for one velocity.
        turns: turns N of a trajectory.
        steps: denoising steps S of a turn.
        trajectories: trajectories of a round, over all GPUs.
        rounds: number of rounds of the run.
        sampling_batch: trajectories that are sampled at once.
        evaluation_batch: the same in evaluation.
        training_batch: loss entries of a micro-batch.
        one_by_one: whether the pipeline samples one trajectory at a time, independent of the batch.
        average: whether there is an averaged policy, a third set of adapters.
        checkpointing: whether activations are recomputed in the backward pass.
        blocks: number of blocks of the transformer.
        kept_blocks: number of blocks that are not recomputed under checkpointing.
        quantize: quantization of the linear layers of transformer and text encoders.
        encoders: placement of the text encoders: on the "device" beside the transformer, on it
            "ahead" of the transformer, or on the "host".
        reads_images: whether text encoders read the images of every turn, so that they cannot run
            ahead.
        more_adapters: sets of frozen adapters besides those of the policies, of the same rank.
        sampler: few-step sampler; None: the trained model samples. Not with ``shard``.
        vae_slicing: whether images are decoded one by one.
        vae_tiling: whether images are decoded in tiles.
        optimizer_bytes: bytes of optimizer state per adapter weight.
        shard: sharding of weights over the GPUs: "fsdp2" with the adapters, "zero3" without them.
        gpus: number of GPUs that train.
        dtype: dtype of weights and arithmetic.

    Raises:
        ValueError: a number is out of range.
    """

    costs: ModelCosts
    passes: Passes
    branches: int = 1
    turns: int = 3
    steps: int = 6
    trajectories: int = 128
    rounds: int = 100
    sampling_batch: int = 8
    evaluation_batch: int = 8
    training_batch: int = 4
    one_by_one: bool = False
    average: bool = True
    checkpointing: bool = True
    blocks: int = 1
    kept_blocks: int = 0
    quantize: Quantize = "none"
    encoders: Literal["device", "ahead", "host"] = "device"
    reads_images: bool = False
    more_adapters: int = 0
    sampler: Sampler | None = None
    vae_slicing: bool = False
    vae_tiling: bool = False
    optimizer_bytes: int = 8
    shard: Literal["none", "fsdp2", "zero3"] = "none"
    gpus: int = 1
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        for name in ("branches", "turns", "steps", "trajectories", "rounds", "sampling_batch",
                     "evaluation_batch", "training_batch", "gpus"):  # fmt: skip
            check_count(name, getattr(self, name))
        check_count("blocks", self.blocks)
        check_count("kept_blocks", self.kept_blocks, low=0)
        if self.kept_blocks > (self.blocks if self.checkpointing else 0):
            raise ValueError(
                f"kept_blocks: expected at most the {self.blocks} blocks, and 0 without "
                f"checkpointing, got {self.kept_blocks}"
            )
        check_choice("quantize", self.quantize, ("none", *BYTES))
        check_choice("shard", self.shard, ("none", "fsdp2", "zero3"))
        check_choice("encoders", self.encoders, ("device", "ahead", "host"))
        if self.sampler is not None and self.shard != "none":
            raise ValueError(f"sampler: expected None under {self.shard}, got {self.sampler}")

    @property
    def kept_share(self) -> float:
        """Return the share of the blocks whose activations are kept."""
        return self.kept_blocks / self.blocks if self.checkpointing else 1.0

    @property
    def sampling_row(self) -> Costs:
        """Return the costs of a row of the model that samples."""
        sampler = self.sampler
        return (sampler and sampler.sibling) or self.costs.row

    @property
    def sampling_forward(self) -> float:
        """Return the FLOPs of a forward pass of one branch of the model that samples."""
        return self.sampling_row.forward + (self.sampler.lora_forward if self.sampler else 0)


@dataclass(frozen=True)
class Phase:
    """Memory of one phase of a round on one GPU, in bytes.

    Attributes:
        name: name of the phase in tables.
        weights: frozen weights of the transformer, the autoencoder, and text encoders on the GPU.
        adapters: adapters of all policies, gradients and optimizer state.
        activations: peak of everything else.
    """

    name: str
    weights: float
    adapters: float
    activations: float

    @property
    def total(self) -> float:
        """Return the bytes of the phase at its peak."""
        return self.weights + self.adapters + self.activations


def phases(plan: Plan) -> tuple[Phase, ...]:
    """Return the memory of every phase of a round on one GPU.

    Args:
        plan: the run.
    """
    row, vae = plan.costs.row, plan.costs.vae
    size = plan.dtype.itemsize
    encoders = plan.costs.encoders
    parts = 1 if plan.shard == "none" else plan.gpus
    # FSDP2 shards adapters, gradients and optimizer state, too; under ZeRO-3 they are whole.
    copies = plan.gpus if plan.shard == "fsdp2" else 1
    weights = _packed(plan, row.weights, row.linear) + size * row.buffers
    weights = weights / parts + size * vae.weights
    more = plan.sampler or Sampler()
    if more.sibling is not None:
        weights += _packed(plan, more.sibling.weights, more.sibling.linear)
        weights += size * more.sibling.buffers
    # The largest layer, unpacked for its product; and the gathered block with the prefetched next.
    temporary = size * row.largest if plan.quantize != "none" else 0
    temporary += 2 * size * row.block if parts > 1 else 0
    # Adapters are float32: current and old policy, average; an update adds the gradients.
    policies = 2 + plan.average + plan.more_adapters
    resting = row.adapters * (4 * policies + plan.optimizer_bytes) / copies
    resting += 4 * (more.sets * row.adapters + more.lora)
    training = resting + 4 * row.adapters / copies

    def sampling(name: str, batch: int, used: Costs) -> Iterator[Phase]:
        rows = 1 if plan.one_by_one else batch
        images = 1 if plan.vae_slicing else rows
        decode = max(vae.decode_tiled if plan.vae_tiling else vae.decode, vae.encode)
        yield Phase(name, weights, resting, rows * used.sample + temporary)
        yield Phase(f"{name}, VAE", weights, resting, VAE_MARGIN * images * decode)

    visit = _packed(plan, encoders.weights, encoders.linear)
    texts = {
        "device": Phase("text encoders", weights + visit, resting, encoders.encode),
        "ahead": Phase("text encoders", visit, 0, encoders.encode),
        "host": Phase("text encoders", weights, resting, 0),
    }
    # An upper bound: blocks differ in size, and kept ones are freed before others are recomputed.
    update = row.update + plan.kept_share * (row.update_plain - row.update)
    rows = plan.training_batch * plan.passes.members
    return (
        texts[plan.encoders],
        *sampling("sampling", plan.sampling_batch, plan.sampling_row),
        Phase("update", weights, training, rows * update + temporary),
        *sampling("evaluation", plan.evaluation_batch, row),
    )


def _packed(plan: Plan, weights: int, linear: int) -> float:
    """Return the bytes of weights, of which ``linear`` may be packed."""
    packed = BYTES.get(plan.quantize, plan.dtype.itemsize)
    return linear * packed + (weights - linear) * plan.dtype.itemsize


def usable(memory: float) -> float:
    """Return the bytes of a GPU that tensors can use, without context and fragmentation.

    Args:
        memory: GiB of the GPU, as ``nvidia-smi`` reports them; 24 for a 24 GB card.

    Raises:
        ValueError: the memory is not in (0.6, 10,000] GiB.

    Example:
        >>> round(usable(24) / 2**30, 2)
        22.23
    """
    check_number("memory", memory, low=CONTEXT, high=LARGEST, open_low=True)
    return (memory - CONTEXT) * USABLE * GIB


def peak(plan: Plan) -> Phase:
    """Return the phase with the highest memory."""
    return max(phases(plan), key=lambda phase: phase.total)


def verdict(plan: Plan, memory: float) -> Verdict:
    """Return whether a run "fits" (below 90% of usable memory), is "tight" (up to 100%), or "no".

    Args:
        plan: the run.
        memory: memory of the GPU in GiB.

    Raises:
        ValueError: the memory is out of range.
    """
    share = peak(plan).total / usable(memory)
    return "fits" if share < COMFORTABLE else "tight" if share <= 1 else "no"
