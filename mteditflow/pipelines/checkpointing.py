"""Gradient checkpointing of a transformer's blocks: of all, or of all but the last ones."""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from torch.utils.checkpoint import checkpoint


def enable_checkpointing(model: nn.Module, kept_blocks: int = 0) -> None:
    """Recompute the blocks of a diffusers model in the backward pass, except for the last ones.

    The backward pass frees the activations of the last blocks first, so that they are gone when
    other blocks are recomputed. Gradients do not depend on ``kept_blocks``.

    Args:
        model: a diffusers model that supports gradient checkpointing.
        kept_blocks: number of last blocks whose activations are kept; 0 recomputes all.

    Raises:
        ValueError: the model has fewer blocks, or does not support checkpointing.
    """
    kinds = {
        kind
        for attribute in ("_repeated_blocks", "_no_split_modules")
        for kind in getattr(model, attribute, None) or ()
    }
    blocks = [part for part in model.modules() if type(part).__name__ in kinds]
    if not 0 <= kept_blocks <= len(blocks):
        raise ValueError(
            f"kept_blocks: expected at most the {len(blocks)} blocks of a {type(model).__name__}, "
            f"got {kept_blocks}"
        )
    # ``blocks[-kept_blocks:]`` would be all blocks at 0.
    kept = {id(block) for block in blocks[len(blocks) - kept_blocks :]}

    def run(block: nn.Module, *inputs: Any) -> Any:
        if id(block) in kept:
            return block(*inputs)
        # Reentrant checkpoints give no gradient if no input needs one, as in a frozen first block.
        return checkpoint(block.__call__, *inputs, use_reentrant=False)

    cast(Any, model).enable_gradient_checkpointing(run)
