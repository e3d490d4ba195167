"""Advantages for a trainer with rewards in numpy: one call in place of its own loop.

    python examples/importing/numpy_advantages.py

Shows `torch.from_numpy`, which does not copy, and the conversion back; float64 without conversion;
lost rewards as NaN, left out of every mean and std by a mask; several rewards fused; and statistics
per prompt of one round, as in flow_grpo: with each prompt's std, or that of the whole batch (its
`global_std`). Leaves out the trainer, which must skip rows that are not valid; and scores per turn,
for which `pad_turns` takes None where one was lost, and NaN where there was nothing to measure.
"""

import numpy as np
import torch

from mteditflow import fuse_advantages, group_advantage

rng = np.random.default_rng(0)
prompts = np.array(["a red fox", "two cups", "a red fox", "a bridge"] * 6)  # one per trajectory
rewards = {"following": rng.random(24), "consistency": 0.9 + 0.05 * rng.random(24)}
rewards["following"][[3, 10]] = np.nan  # here NaN means lost: the judge did not answer


def per_prompt_loop(reward: np.ndarray, *, global_std: bool) -> np.ndarray:
    """Collect the rewards of each prompt, then normalize one by one: one call replaces this."""
    answered = np.isfinite(reward)
    history: dict[str, list[float]] = {}
    for prompt, value in zip(prompts[answered], reward[answered], strict=True):
        history.setdefault(prompt, []).append(value)
    advantage = np.zeros_like(reward)
    for row in np.flatnonzero(answered):
        own = history[prompts[row]]
        std = np.std(reward[answered] if global_std else own)
        advantage[row] = (reward[row] - np.mean(own)) / (std + 1e-4)
    return advantage


# Any integers are valid group ids: here, the index of each prompt among the distinct ones.
group = torch.from_numpy(np.unique(prompts, return_inverse=True)[1])
tensors = {name: torch.from_numpy(reward) for name, reward in rewards.items()}
valid = tensors["following"].isfinite()  # not lost; in the loss, leave out the other rows

for std, global_std in (("group", False), ("batch", True)):
    advantage = group_advantage(tensors["following"], group, valid=valid, std=std).numpy()
    loop = per_prompt_loop(rewards["following"], global_std=global_std)
    print(f"std of the {std}: {advantage.dtype}, off the loop by {abs(advantage - loop).max():.0e}")
print(f"lost: reward {rewards['following'][3]}, advantage {advantage[3]}, valid {bool(valid[3])}")

# Two rewards of very different spread: each is normalized separately, then weighted.
fused = fuse_advantages(tensors, {"following": 1.0, "consistency": 0.2}, group, valid=valid)
print(f"fused: {np.array2string(fused.numpy()[:4], precision=2)}")

# Tensors and arrays share memory: the next call uses what the trainer writes into the arrays.
rewards["following"][:] = 0.5
print(f"all equal: {group_advantage(tensors['following'], group).unique().tolist()}")
