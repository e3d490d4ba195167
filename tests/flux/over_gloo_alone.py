"""The trainer under ZeRO-3, without DeepSpeed's collectives for CPUs: a minute to compile."""

import runpy
from functools import wraps

import deepspeed.ops
from torch import nn

from tests.flux.worlds import SCRIPT
from tests.loops import some


def without_extension() -> None:
    """Let DeepSpeed's ranks talk over gloo alone."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def main() -> None:
    """Run the trainer; fail unless it partitions a model, and trains whole adapters of it."""
    partitioned: list[nn.Module] = []
    initialize = deepspeed.initialize

    @wraps(initialize)
    def watched(**given: object) -> object:
        engine = initialize(**given)
        partitioned.append(given["model"])
        assert not any(weight.numel() for weight in some(partitioned[0].parameters()))
        return engine

    deepspeed.initialize = watched
    without_extension()
    runpy.run_path(str(SCRIPT), run_name="__main__")
    (model,) = partitioned
    adapters = [weight for name, weight in model.named_parameters() if "lora_" in name]
    assert all(weight.numel() and not hasattr(weight, "ds_id") for weight in some(adapters))


if __name__ == "__main__":
    main()
