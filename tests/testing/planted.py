"""Faults seen in the field, planted into small copies written here, and the law that finds each.

``PLANTED`` maps a kind of function to (what is wrong, subject, law).
"""

from __future__ import annotations

import random
from functools import partial

import numpy as np
import torch

from mteditflow.testing import (
    Aggregator,
    Average,
    Density,
    Fusion,
    GroupAdvantage,
    LogProb,
    Loss,
    NFTLoss,
    PolicyLoss,
    Selection,
    SolverStep,
    TurnCreditFunction,
)

# Group advantages: a right one in numpy and one in torch, each with a place for a fault.


def in_groups(function):
    """A group advantage from a function of one group's rewards; lost rewards get 0."""

    def advantage(reward, group, valid=None):
        out = torch.zeros_like(reward)
        valid = torch.ones_like(reward, dtype=torch.bool) if valid is None else valid
        for name in set(group.tolist()):
            members = torch.tensor([g == name for g in group.tolist()]) & valid
            if members.any():
                out[members] = function(reward.detach()[members]).to(out.dtype)
        return out

    return advantage


def sound(x, eps=1e-4, ddof=0):
    if len(x) < 2 or x.min() == x.max():
        return torch.zeros_like(x)
    return (x - x.mean()) / (x.double().std(correction=ddof).to(x) + eps)


def dividing_by_rounding(x):
    return torch.zeros_like(x) if len(x) < 2 else (x - x.mean()) / x.std(correction=0)


def with_small_eps(x):
    return torch.zeros_like(x) if len(x) < 2 else (x - x.mean()) / (x.std(correction=0) + 1e-8)


def nan_for_one_member(x):
    return (x - x.mean()) / (x.std() + 1e-4)


def raw_reward_for_one_member(x):
    return x if len(x) == 1 else sound(x)


def variance_of_squares(x):
    if len(x) < 2 or x.min() == x.max():
        return torch.zeros_like(x)
    y = x.float()
    return ((y - y.mean()) / ((y.square().mean() - y.mean().square()).sqrt() + 1e-4)).to(x)


def divided_by_the_variance(x):
    return sound(x) / (x.std(correction=0) + 1e-4) if x.min() != x.max() else sound(x)


def in_place(reward, group, valid=None):
    advantage = in_groups(sound)(reward, group, valid)
    reward -= reward.mean()
    return advantage


def ids_in_place(reward, group, valid=None):
    advantage = in_groups(sound)(reward, group, valid)
    group -= group.min().item()
    return advantage


def counted_ids(reward, group):
    total, count = np.bincount(group, reward), np.bincount(group)
    return reward - (total / np.maximum(count, 1))[group]


def over_the_batch(reward, group, valid=None):
    spread = reward.std(correction=0)
    return in_groups(lambda x: (x - x.mean()) / (spread + 1e-4))(reward, group, valid)


def over_the_sample(reward, group, valid=None):
    spread = reward.double().std() if len(reward) > 1 else torch.tensor(1.0)
    return in_groups(lambda x: (x - x.mean()) / (spread + 1e-4))(reward, group, valid)


def mean_of_the_batch(reward, group, valid=None):
    return (reward - reward.mean()) / (reward.std(correction=0) + 1e-4)


def baseline_of_the_batch(reward, group, valid=None):
    """Whitened in groups in scale alone: the mean is that of the whole batch."""
    if reward.min() == reward.max():
        return torch.zeros_like(reward)
    spread = in_groups(lambda x: x.std(correction=0).expand(len(x)))(reward, group, valid)
    return (reward - reward.mean()) / (spread + 1e-4)


def nan_beside_larger_groups(reward, group, valid=None):
    """Only a batch of nothing but groups of one is tested for."""
    if len(set(group.tolist())) == len(group):
        return torch.zeros_like(reward)
    return in_groups(lambda x: sound(x) if len(x) > 1 else x - torch.nan)(reward, group, valid)


def ids_through_float32(reward, group, valid=None):
    return in_groups(sound)(reward, group.float(), valid)


def ids_as_positions(reward, group, valid=None):
    total = torch.zeros(1000, dtype=reward.dtype).index_add(0, group.long(), reward)
    count = torch.zeros(1000, dtype=reward.dtype).index_add(
        0, group.long(), torch.ones_like(reward)
    )
    centered = reward - (total / count)[group.long()]
    return torch.where(centered == 0, 0, in_groups(sound)(reward, group, valid))


def runs_of_equal_ids(reward, group, valid=None):
    """Groups are runs of neighbors, as a sorted loader delivers them."""
    new = torch.cat([torch.ones(1, dtype=torch.bool), group[1:] != group[:-1]])
    return in_groups(sound)(reward, new.cumsum(0), valid)


def lost_as_zero(reward, group, valid=None):
    keep = torch.ones_like(reward, dtype=torch.bool) if valid is None else valid
    return in_groups(sound)(torch.where(keep, reward, 0), group) * keep


def lost_keep_their_advantage(reward, group, valid=None):
    return in_groups(sound)(reward.nan_to_num(0, 0, 0).clamp(-99, 99), group)


def stopped_by_lost_batches(reward, group, valid=None):
    keep = torch.ones_like(reward, dtype=torch.bool) if valid is None else valid
    return in_groups(sound)(reward - reward[keep].min(), group, valid)


def mask_by_product(reward, group, valid=None):
    keep = torch.ones_like(reward) if valid is None else valid.to(reward)
    return in_groups(sound)(reward, group, valid) + 0 * (reward * keep)


def in_half(reward, group, valid=None):
    return in_groups(sound)(reward.bfloat16().to(reward), group, valid)


def in_the_dtype_of_rewards(reward, group, valid=None):
    return in_groups(sound)(reward.double(), group, valid).to(reward.dtype)


def first_eight(x):
    if len(x) < 2 or x.min() == x.max():
        return torch.zeros_like(x)
    return (x - x[:8].mean()) / (x[:8].std(correction=0) + 1e-4)


def in_blocks(reward, group, valid=None):
    parts = [slice(i, i + 32) for i in range(0, len(reward), 32)]
    return torch.cat([in_groups(sound)(reward[part], group[part]) for part in parts])


def fourth_group_raw(reward, group, valid=None):
    names = sorted(set(group.tolist()))
    raw = group == names[-1] if len(names) > 3 else torch.zeros_like(group, dtype=torch.bool)
    return torch.where(raw, reward, in_groups(sound)(reward, group, valid))


def sums_of_deviations(x):
    return len(x) * (x - x.mean())


def seeded(reward, group, valid=None):
    torch.manual_seed(0)
    return in_groups(sound)(reward, group, valid)


def default_dtype(reward, group, valid=None):
    scale = torch.tensor([1 / 3], device=reward.device).to(reward)
    return 3 * scale * in_groups(sound)(reward, group, valid)


def default_device(reward, group, valid=None):
    return in_groups(sound)(reward, group, valid) + torch.zeros(len(reward), dtype=reward.dtype)


def with_gradient(reward, group, valid=None):
    return in_groups(sound)(reward, group, valid) + (reward - reward)


def accumulated_in_half(reward, group, valid=None):
    def whitened(x):
        return torch.zeros_like(x) if len(x) < 2 else (x - x.mean()) / (x.std(correction=0) + 1e-2)

    return in_groups(whitened)(reward, group, valid)


def mask_in_place(reward, group, valid=None):
    advantage = in_groups(sound)(reward, group, valid)
    if valid is not None:
        valid.fill_(True)
    return advantage


def lost_in_place(reward, group, valid=None):
    """Lost rewards become 0 in the caller's tensor, too."""
    if valid is not None:
        reward[~valid] = 0
    return in_groups(sound)(reward, group, valid)


def std_of_the_lost(reward, group, valid=None):
    """A leak across the mask: the mean is that of valid members, the std that of all."""
    kept = torch.ones_like(reward, dtype=torch.bool) if valid is None else valid
    scale = in_groups(lambda x: x.std(correction=0).expand(len(x)) + 1e-4)
    own, all_ = (scale(torch.where(kept, reward, 0), group, mask) for mask in (kept, None))
    return torch.where(kept, in_groups(sound)(reward, group, valid) * own / all_, 0)


def cut_to_int32(reward, group, valid=None):
    return in_groups(sound)(reward, group.int(), valid)


def seeding(seed):
    def advantage(reward, group, valid=None):
        seed(0)
        return in_groups(sound)(reward, group, valid)

    return advantage


def eps_inside_the_root(x):
    return (
        torch.zeros_like(x) if len(x) < 2 else (x - x.mean()) / (x.var(correction=0) + 1e-4) ** 0.5
    )


def centered_when_half(reward, group, valid=None):
    """Another formula where rewards are in half precision: the std is left out."""
    if reward.dtype in (torch.bfloat16, torch.float16):
        return in_groups(lambda x: x.float() - x.float().mean())(reward, group, valid)
    return in_groups(sound)(reward, group, valid)


def complex_root(reward, group, valid=None):
    return in_groups(sound)(reward, group, valid).to(torch.complex128) * 1j


def token_level(fault):
    """An advantage per token, [B, L], with a fault at some of the tokens."""

    def advantage(token_level_rewards, response_mask, index):
        names = torch.from_numpy(np.unique(index, return_inverse=True)[1])
        row = in_groups(sound)(token_level_rewards.sum(1), names)[:, None]
        return fault(row.expand(response_mask.shape).clone(), response_mask), None

    return GroupAdvantage(advantage, "verl")


def later_tokens_turned_over(advantage, mask):
    advantage[:, 1:] *= -1
    return advantage * mask


class Remembering:
    """A tracker that keeps rewards of earlier calls under the same prompt."""

    def __init__(self):
        self.rewards = {}

    def __call__(self, reward, group, valid=None):
        out = np.zeros(len(reward))
        for name in np.unique(group):
            here = group == name
            past = self.rewards.setdefault(int(name), [])
            past.extend(reward[here])
            out[here] = (reward[here] - np.mean(past)) / (np.std(past) + 1e-4)
        return out


def advantage(function, **options):
    return GroupAdvantage(function, **options)


def grouped(function):
    return advantage(in_groups(function))


ADVANTAGE = [
    ("std of the sample, unannounced", grouped(partial(sound, ddof=1)), "size"),
    (
        "std of the sample of the batch",
        advantage(over_the_sample, std="batch"),
        "size",
    ),
    ("no std, times the members", advantage(in_groups(sums_of_deviations), std="none"), "size"),
    ("the first eight members", grouped(first_eight), "large-groups"),
    ("blocks of 32 rows", advantage(in_blocks), "large-groups"),
    ("advantages clipped at 1", grouped(lambda x: sound(x).clamp(-1, 1)), "large-groups"),
    ("advantages clipped at 5", grouped(lambda x: sound(x).clamp(-5, 5)), "large-groups"),
    ("the fourth group left raw", advantage(fourth_group_raw), "large-groups"),
    ("integers in, integers out", advantage(in_the_dtype_of_rewards), "whole-numbers"),
    ("a global seed", advantage(seeded), "pure"),
    ("half the size", grouped(lambda x: sound(x) / 2), "size"),
    ("no eps and no test for equal rewards", grouped(dividing_by_rounding), "constant-group"),
    ("eps of 1e-8 in float32", grouped(with_small_eps), "constant-group"),
    ("mean of the whole batch", advantage(baseline_of_the_batch), "constant-group"),
    ("NaN beside larger groups", advantage(nan_beside_larger_groups), "one-member"),
    ("NaN for one member", grouped(nan_for_one_member), "one-member"),
    ("raw reward for one member", grouped(raw_reward_for_one_member), "one-member"),
    ("variance as E[x^2] - E[x]^2 in float32", grouped(variance_of_squares), "shift"),
    ("rewards clipped", grouped(lambda x: sound(x.clamp(-5, 5))), "shift"),
    ("divided by the variance", grouped(divided_by_the_variance), "scale"),
    ("tanh of the advantage's unit", grouped(lambda x: torch.tanh(x - x.mean())), "scale"),
    ("sign turned over", grouped(lambda x: -sound(x)), "monotone"),
    ("absolute value", grouped(lambda x: sound(x).abs()), "zero-sum"),
    ("mean not taken off", grouped(lambda x: sound(x) + x.mean()), "zero-sum"),
    ("mean of the batch", advantage(mean_of_the_batch), "zero-sum"),
    ("std of the batch, unannounced", advantage(over_the_batch), "split-equals-whole"),
    ("ids pass through float32", advantage(ids_through_float32), "relabeled-groups"),
    ("ids serve as positions", advantage(ids_as_positions), "relabeled-groups"),
    ("groups must be neighbors", advantage(runs_of_equal_ids), "permutation"),
    ("a lost reward counts as 0", advantage(lost_as_zero), "mask-equals-deletion"),
    ("a lost reward is trained", advantage(lost_keep_their_advantage), "mask-equals-deletion"),
    ("no valid member is an error", advantage(stopped_by_lost_batches), "mask-equals-deletion"),
    ("a mask by multiplication", advantage(mask_by_product), "invalid-never-read"),
    ("rewards in bfloat16", advantage(in_half), "float32-accuracy"),
    ("a constant in the default dtype", advantage(default_dtype), "default-dtype-and-device"),
    ("a tensor on the default device", advantage(default_device), "default-dtype-and-device"),
    ("a gradient to the reward", advantage(with_gradient, detaches=True), "no-gradient"),
    ("the argument changed in place", advantage(in_place), "pure"),
    ("the ids changed in place", advantage(ids_in_place), "pure"),
    ("the mask changed in place", advantage(mask_in_place), "pure"),
    ("lost rewards changed in place", advantage(lost_in_place), "pure"),
    ("a std over lost members", advantage(std_of_the_lost), "mask-equals-deletion"),
    (
        "a result in float16",
        advantage(lambda *x: in_groups(sound)(*x).half(), signature="tensors"),
        "float32-accuracy",
    ),
    (
        "ids counted up to the largest",
        advantage(counted_ids, signature="numpy", std="none"),
        "relabeled-groups",
    ),
    ("a tracker never cleared", advantage(Remembering(), signature="numpy"), "pure"),
    (
        "statistics in half precision",
        advantage(accumulated_in_half, float32=True),
        "half-precision",
    ),
    ("no std in half precision", advantage(centered_when_half), "half-precision"),
    ("ids cut to int32", advantage(cut_to_int32), "relabeled-groups"),
    ("numpy's global seed", advantage(seeding(np.random.seed)), "pure"),
    ("Python's global seed", advantage(seeding(random.seed)), "pure"),
    ("eps inside the root", grouped(eps_inside_the_root), "size"),
    ("complex numbers", advantage(complex_root), "monotone"),
    ("tokens after the first turned over", token_level(later_tokens_turned_over), "monotone"),
    ("an advantage in padding", token_level(lambda advantage, mask: advantage), "monotone"),
]


# Turns


def mean_of_turns(score, turn_mask):
    return torch.where(turn_mask, score, 0).double().sum(1) / turn_mask.sum(1)


def default_dtype_mean(score, turn_mask):
    weight = turn_mask.to(torch.get_default_dtype())
    weight = weight / weight.sum(1, keepdim=True)
    return (torch.where(turn_mask, score, 0).to(weight.dtype) * weight).sum(1)


def on_the_default_device(score, turn_mask):
    return mean_of_turns(score, turn_mask) * torch.ones(len(score))


def whole_number_mean(score, turn_mask):
    total = torch.where(turn_mask, score, 0).sum(1)
    return total // turn_mask.sum(1) if not score.is_floating_point() else total / turn_mask.sum(1)


def last_score(score, turn_mask):
    return score.gather(1, turn_mask.sum(1, keepdim=True) - 1)[:, 0]


def over_the_mean_length(score, turn_mask):
    total = torch.where(turn_mask, score, 0).double().sum(1)
    return total / turn_mask.sum(1).double().mean()


def sum_of_turns(score, turn_mask):
    return torch.where(turn_mask, score, 0).sum(1)


def padding_in_place(score, turn_mask):
    return mean_of_turns(score.masked_fill_(~turn_mask, 0), turn_mask)


def whitened_chains(score, turn_mask):
    mean = mean_of_turns(score, turn_mask)
    return mean - mean.mean()


AGGREGATOR = [
    ("a sum", Aggregator(sum_of_turns), "length"),
    ("a sum over the mean length of the batch", Aggregator(over_the_mean_length), "length"),
    ("a sum of Likert scores", Aggregator(sum_of_turns, values=(1.0, 5.0)), "informative"),
    (
        "padding counts as failed turns",
        Aggregator(lambda s, turn_mask: torch.where(turn_mask, s, 0).mean(1)),
        "padding-equals-deletion",
    ),
    (
        "a mask by multiplication",
        Aggregator(lambda s, turn_mask: (s * turn_mask).sum(1) / turn_mask.sum(1)),
        "padding-never-read",
    ),
    ("integer division", Aggregator(whole_number_mean), "whole-numbers"),
    ("the last turn alone", Aggregator(last_score), "turn-order"),
    ("ones on the default device", Aggregator(on_the_default_device), "default-dtype-and-device"),
    ("weights in the default dtype", Aggregator(default_dtype_mean), "default-dtype-and-device"),
    ("whitened over the batch", Aggregator(whitened_chains), "chains-independent"),
    ("padding zeroed in place", Aggregator(padding_in_place), "pure"),
    (
        "a result in bfloat16",
        Aggregator(lambda s, turn_mask: mean_of_turns(s, turn_mask).bfloat16()),
        "precision",
    ),
    ("a constant", Aggregator(lambda s, turn_mask: torch.ones(len(s))), "informative"),
    (
        "failures count",
        Aggregator(lambda s, turn_mask: 1 - mean_of_turns(s, turn_mask)),
        "monotone",
    ),
]


def returns(reward, turn_mask):
    reward = torch.where(turn_mask, reward, 0)
    return torch.where(turn_mask, reward.flip(1).cumsum(1).flip(1), 0)


def credit(function, **options):
    return TurnCreditFunction(function, **options)


def past_returns(reward, turn_mask):
    return torch.where(turn_mask, torch.where(turn_mask, reward, 0).cumsum(1), 0)


def best_to_come(reward, turn_mask):
    best = torch.where(turn_mask, reward, -9).flip(1).cummax(1).values.flip(1)
    return torch.where(turn_mask, best, 0)


def chain_in_padding(reward, turn_mask):
    reward = torch.where(turn_mask, reward, 0)
    return reward.flip(1).cumsum(1).flip(1) + torch.where(turn_mask, 0, 1)


def without_own(reward, turn_mask):
    reward = torch.where(turn_mask, reward, 0)
    return torch.where(turn_mask, returns(reward, turn_mask) - reward, 0)


def shared_with_the_next_turn(reward, turn_mask):
    """Off by one: a turn gets the return of the turn before it."""
    return torch.where(turn_mask, returns(reward, turn_mask).roll(1, dims=1), 0)


def rewards_used_up(reward, turn_mask):
    credit_ = returns(reward, turn_mask)
    reward.zero_()
    return credit_


CREDIT = [
    ("the return of the turn before", credit(shared_with_the_next_turn), "last-turn"),
    ("the rewards are used up", credit(rewards_used_up), "pure"),
    ("the past is paid", credit(past_returns), "causal"),
    ("padding gets credit", credit(chain_in_padding), "padding-is-zero"),
    ("a turn's own reward is left out", credit(without_own), "last-turn"),
    ("the best turn to come", credit(best_to_come), "linear"),
]


# Fusion and selection


def fused(rewards, weights, group, valid=None, *, transform=sound, level="advantage"):
    if level == "reward":
        total = sum(weights[name] * reward for name, reward in rewards.items())
        return in_groups(transform)(total, group, valid)
    return sum(
        weights[name] * in_groups(transform)(reward, group, valid)
        for name, reward in rewards.items()
    )


def by_position(rewards, weights, group, valid=None):
    positions = dict(zip(rewards, weights.values(), strict=True))
    return fused(rewards, positions, group, valid)


def scaled_by_all(rewards, weights, group, valid=None):
    spread = sum(x.nan_to_num(0, 0, 0).abs().max() for x in rewards.values())
    return fused(rewards, weights, group, valid) / (1 + spread)


def about_the_batch(rewards, weights, group, valid=None):
    return sum(w * baseline_of_the_batch(rewards[name], group) for name, w in weights.items())


def scaled_by_the_batch(rewards, weights, group, valid=None):
    return sum(w * over_the_batch(rewards[name], group, valid) for name, w in weights.items())


def squared_weights(rewards, weights, group, valid=None):
    return fused(rewards, {name: w * w for name, w in weights.items()}, group, valid)


def lost_as_zero_everywhere(rewards, weights, group, valid=None):
    if valid is not None:
        rewards = {name: torch.where(valid, x, 0) for name, x in rewards.items()}
    return fused(rewards, weights, group)


def unmeasured_as_zero(rewards, weights, group, valid=None, measured=None):
    """What peers do that put 0 in place of a number: the worst consistency of the group."""
    for name, mask in (measured or {}).items():
        rewards = {**rewards, name: torch.where(mask, rewards[name], 0)}
    return fused(rewards, weights, group, valid)


def unmeasured_as_lost(rewards, weights, group, valid=None, measured=None):
    for mask in (measured or {}).values():
        valid = mask if valid is None else mask & valid
    return fused(rewards, weights, group, valid)


def fused_through_float32(rewards, weights, group, valid=None):
    return fused(rewards, weights, group.float(), valid)


def about_the_kept(rewards, weights, group, valid=None):
    """Shifted by the mean of all valid rewards, which no valid reward has."""
    valid = torch.ones_like(group, dtype=torch.bool) if valid is None else valid
    kept = {name: torch.where(valid, x, 0) for name, x in rewards.items()}
    shifted = {name: x - x[valid].mean() for name, x in kept.items()}
    return fused(shifted, weights, group, valid) + 0 * sum(shifted.values())


def weights_in_place(rewards, weights, group, valid=None):
    advantage = fused(rewards, weights, group, valid)
    for name in weights:
        weights[name] /= 4
    return advantage


def rewards_in_place(rewards, weights, group, valid=None):
    advantage = fused(rewards, weights, group, valid)
    for reward in rewards.values():
        reward -= reward.mean()
    return advantage


def fused_in_the_default_dtype(rewards, weights, group, valid=None):
    third = torch.tensor(1 / 3, device=group.device).double()
    return 3 * third * fused(rewards, weights, group, valid)


def centered(x):
    return x - x.mean()


FUSION = [
    ("weights by position", Fusion(by_position), "order-of-names"),
    ("the scale of all rewards", Fusion(scaled_by_all), "zero-weight"),
    ("rewards are summed first", Fusion(partial(fused, level="reward")), "unit-free"),
    ("weights squared", Fusion(squared_weights), "linear-in-weights"),
    ("means not taken off", Fusion(partial(fused, transform=lambda x: x)), "zero-sum"),
    ("no eps", Fusion(partial(fused, transform=dividing_by_rounding)), "constant-group"),
    ("means of the whole batch", Fusion(about_the_batch), "constant-group"),
    ("stds of the whole batch", Fusion(scaled_by_the_batch), "split-equals-whole"),
    ("sign turned over", Fusion(partial(fused, transform=lambda x: -sound(x))), "monotone"),
    (
        "a fused reward that is not normalized",
        Fusion(partial(fused, level="reward", transform=centered), level="reward"),
        "common-factor",
    ),
    ("a lost reward counts as 0", Fusion(lost_as_zero_everywhere), "mask-equals-deletion"),
    ("NaN where all rewards are lost", Fusion(about_the_kept), "mask-equals-deletion"),
    ("ids pass through float32", Fusion(fused_through_float32), "relabeled-groups"),
    ("the weights changed in place", Fusion(weights_in_place), "pure"),
    ("the rewards changed in place", Fusion(rewards_in_place), "pure"),
    ("half the size", Fusion(lambda *x, **mask: fused(*x, **mask) / 2), "size"),
    (
        "std of the sample, unannounced",
        Fusion(partial(fused, transform=partial(sound, ddof=1))),
        "size",
    ),
    (
        "a result in float16",
        Fusion(lambda *x, **mask: fused(*x, **mask).half()),
        "float32-accuracy",
    ),
    (
        "a constant in the default dtype",
        Fusion(fused_in_the_default_dtype),
        "default-dtype-and-device",
    ),
    ("nothing to measure counts as 0", Fusion(unmeasured_as_zero), "unmeasured"),
    ("nothing to measure counts as lost", Fusion(unmeasured_as_lost), "unmeasured"),
]


def informative(reward, group, valid, *, test=lambda x: x.min() != x.max()):
    keep = torch.zeros_like(valid)
    for name in set(group.tolist()):
        members = (group == name) & valid
        if members.sum() > 1 and test(reward[members]):
            keep |= members
    return keep


def rows_off_the_mean(reward, group, valid):
    return informative(reward, group, valid) & (in_groups(sound)(reward, group, valid) != 0)


def counted_in_default_dtype(reward, group, valid):
    def count(members):
        return torch.zeros(1).index_add(0, torch.zeros_like(group), members + torch.zeros(1))

    keep = torch.zeros_like(valid)
    for name in set(group.tolist()):
        members = (group == name) & valid
        at_the_floor = members & (reward == reward[members].min())
        keep |= members & (count(at_the_floor) < count(members))
    return keep


def neighbors_alone(reward, group, valid):
    new = torch.cat([torch.ones(1, dtype=torch.bool), group[1:] != group[:-1]])
    return informative(reward, new.cumsum(0), valid)


def differing_from_the_row_before(reward, group, valid):
    """Kept where a member has another reward than the row before it, of whatever group."""
    other = torch.cat([torch.zeros(1, dtype=torch.bool), reward[1:] != reward[:-1]]) & valid
    return torch.tensor([bool(other[group == g].any()) for g in group.tolist()]) & valid


def mask_narrowed(reward, group, valid):
    valid &= informative(reward, group, valid)
    return valid.clone()


SELECTION = [
    ("the mask is narrowed in place", Selection(mask_narrowed), "pure"),
    (
        "compared with the row before",
        Selection(differing_from_the_row_before),
        "flat-groups-dropped",
    ),
    ("rows are dropped", Selection(rows_off_the_mean), "whole-groups"),
    (
        "rounding of a mean is a spread",
        Selection(partial(informative, test=lambda x: bool(((x - x.mean()) != 0).any()))),
        "flat-groups-dropped",
    ),
    (
        "lost members are kept",
        Selection(lambda r, g, valid: informative(r, g, torch.ones_like(valid))),
        "informative-groups-kept",
    ),
    ("groups must be neighbors", Selection(neighbors_alone), "permutation"),
    (
        "ids pass through float32",
        Selection(lambda r, g, valid: informative(r, g.float(), valid)),
        "relabeled-groups",
    ),
    (
        "ids cut to int32",
        Selection(lambda r, g, valid: informative(r, g.int(), valid)),
        "relabeled-groups",
    ),
    (
        "no valid member is an error",
        Selection(lambda r, g, valid: informative(r, g, valid & (r >= r[valid].min()))),
        "informative-groups-kept",
    ),
    ("default dtype of counts", Selection(counted_in_default_dtype), "default-dtype-and-device"),
]


# Losses


def surrogate(log_prob, old_log_prob, advantage, valid=None, *, low=0.2, high=0.2):
    old_log_prob, advantage = old_log_prob.detach(), advantage.detach()
    if valid is not None:
        log_prob, old_log_prob, advantage = (
            torch.where(valid, x, 0) for x in (log_prob, old_log_prob, advantage)
        )
    ratio = (log_prob - old_log_prob).clamp(-80, 80).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def policy(function, **options):
    return PolicyLoss(function, **{"valid": None} | options)


def maximum_in_place_of_minimum(log_prob, old_log_prob, advantage):
    ratio = (log_prob - old_log_prob.detach()).exp()
    return -torch.maximum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)


def overflowing(log_prob, old_log_prob, advantage):
    ratio = (log_prob - old_log_prob).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)


def both_sides_clipped(log_prob, old_log_prob, advantage):
    return -(log_prob - old_log_prob.detach()).exp().clamp(0.8, 1.2) * advantage.detach()


def no_ratio(log_prob, old_log_prob, advantage):
    return -log_prob * advantage.detach()


def ratio_of_exponentials(log_prob, old_log_prob, advantage):
    return -(log_prob.exp() / old_log_prob.detach().exp()) * advantage.detach()


def gradient_to_the_old(log_prob, old_log_prob, advantage):
    return -(log_prob - old_log_prob).exp() * advantage.detach()


def whitened_inside(log_prob, old_log_prob, advantage):
    return surrogate(log_prob, old_log_prob, advantage - advantage.mean())


def masked_by_product(log_prob, old_log_prob, advantage, valid=None):
    loss = surrogate(log_prob, old_log_prob, advantage)
    return loss if valid is None else loss * valid


def tighter_below(log_prob, old_log_prob, advantage):
    return surrogate(log_prob, old_log_prob, advantage, low=0.17)


def tighter_above(log_prob, old_log_prob, advantage):
    return surrogate(log_prob, old_log_prob, advantage, high=0.18)


def log_ratio_clamped(log_prob, old_log_prob, advantage):
    return surrogate((log_prob - old_log_prob).clamp(-1, 1), 0 * old_log_prob, advantage)


def branch_on_values(log_prob, old_log_prob, advantage):
    loss = surrogate(log_prob, old_log_prob, advantage)
    return loss if bool((advantage > 0).any()) else loss + 0


def constant_in_default_dtype(log_prob, old_log_prob, advantage):
    third = torch.tensor(1 / 3, device=log_prob.device).to(log_prob)
    return surrogate(log_prob, old_log_prob, 3 * third * advantage)


def detached_ratio(log_prob, old_log_prob, advantage):
    ratio = (log_prob - old_log_prob.detach()).exp()
    return -ratio.detach() * advantage.detach() * log_prob


def good_samples_alone(log_prob, old_log_prob, advantage):
    return surrogate(log_prob, old_log_prob, advantage.clamp(min=0))


def advantages_in_place(log_prob, old_log_prob, advantage):
    loss = surrogate(log_prob, old_log_prob, advantage)
    advantage.mul_(0.5)
    return loss


def clipped_above_alone(log_prob, old_log_prob, advantage):
    return surrogate(log_prob, old_log_prob, advantage, low=1.0)


def over_the_std(log_prob, old_log_prob, advantage):
    return surrogate(2 * log_prob, 2 * old_log_prob, advantage)


POLICY_LOSS = [
    ("sign turned over", policy(lambda *x: -surrogate(*x)), "on-policy-gradient"),
    ("only good samples", policy(good_samples_alone), "on-policy-gradient"),
    ("log-probs counted twice", policy(over_the_std), "policy-gradient"),
    ("maximum in place of minimum", policy(maximum_in_place_of_minimum), "clipped-side"),
    ("an exponential that overflows", policy(overflowing), "far-ratios"),
    ("advantages changed in place", policy(advantages_in_place), "pure"),
    ("clipped above alone", policy(clipped_above_alone), "clipped-side"),
    ("both sides clipped", policy(both_sides_clipped), "wrong-side"),
    ("a range tighter below", policy(tighter_below), "inside-the-range"),
    ("a range tighter above", policy(tighter_above), "inside-the-range"),
    ("the log-ratio clamped to 1", policy(log_ratio_clamped), "wrong-side"),
    ("no ratio", policy(no_ratio, clip_low=None, clip_high=None), "wrong-side"),
    (
        "a ratio of exponentials",
        policy(ratio_of_exponentials, clip_low=None, clip_high=None),
        "difference",
    ),
    ("a gradient to the old policy", policy(gradient_to_the_old, detaches=True), "constants"),
    ("advantages whitened inside", policy(whitened_inside), "slice-equals-whole"),
    ("a mask by multiplication", policy(masked_by_product, valid="valid"), "mask-equals-deletion"),
    ("a branch on values", policy(branch_on_values), "compiled-equals-eager"),
    (
        "a constant in the default dtype",
        policy(constant_in_default_dtype),
        "default-dtype-and-device",
    ),
    ("a ratio without gradient", policy(detached_ratio), "gradient-of-value"),
]


def nft(velocity, old_velocity, target, r, *, nft_beta, valid=None, one=1.0, zero=0.0):
    old, aim = old_velocity.detach(), target.detach()
    r = r.reshape(-1, *[1] * (velocity.ndim - 1))
    good = (1 - nft_beta) * old + nft_beta * velocity - aim
    bad = (1 + nft_beta) * old - nft_beta * velocity - aim
    loss = (r * one + (1 - r) * zero) * good.square() + (1 - r) * bad.square()
    return loss.flatten(1).mean(1)


def good_branch(velocity, old_velocity, target, r, *, nft_beta):
    return nft(velocity, old_velocity, target, r, nft_beta=nft_beta, zero=1.0)


def weighted_apart(velocity, old_velocity, target, r, *, nft_beta):
    loss = nft(velocity, old_velocity, target, r, nft_beta=nft_beta)
    return loss + (velocity - old_velocity.detach()).square().flatten(1).mean(1)


def summed(velocity, old_velocity, target, r, *, nft_beta):
    elements = velocity[0].numel()
    return elements * nft(velocity, old_velocity, target, r, nft_beta=nft_beta)


def summed_over_channels(velocity, old_velocity, target, r, *, nft_beta):
    """A mean over all axes but the second; the flat latents of most tests have two elements."""
    channels = velocity.shape[1] / 2
    return channels * nft(velocity, old_velocity, target, r, nft_beta=nft_beta)


def lost_as_undecided(velocity, old_velocity, target, r, *, nft_beta, valid=None):
    if valid is not None:
        r = torch.where(valid, r, 0.5)
    return nft(velocity, old_velocity, target, r, nft_beta=nft_beta)


NFT_LOSS = [
    (
        "the negative branch adds to the positive",
        NFTLoss(good_branch),
        "gradient-at-the-old-policy",
    ),
    ("a pull to the old policy on top", NFTLoss(weighted_apart), "minimum"),
    ("a sum over elements", NFTLoss(summed), "flow-matching"),
    ("a sum over channels", NFTLoss(summed_over_channels), "latent-shape"),
    ("a lost row has r = 1/2", NFTLoss(lost_as_undecided, valid="valid"), "mask-equals-deletion"),
]

MATCHING = {"velocity": "latent", "target": "latent"}


def mean_over_the_valid(velocity, target, valid):
    rows = torch.where(valid[:, None], velocity - target.detach(), 0).square().flatten(1).mean(1)
    return rows.sum() / valid.sum()


def by_norm(velocity, target):
    difference = (velocity - target.detach()).double()
    norm = torch.linalg.vector_norm(difference.flatten(1), dim=1)
    return norm.square() / difference[0].numel()


def squares_in_half(velocity, target):
    return (velocity - target.detach()).square().flatten(1).mean(1)


def root_of_squares(velocity, target):
    return (velocity - target.detach()).double().square().flatten(1).sum(1).sqrt()


def root_guarded_for_all(velocity, target):
    square = (velocity - target.detach()).double().square().flatten(1).sum(1)
    return torch.where(square > 0, square, 1).sqrt() if bool((square == 0).all()) else square.sqrt()


def with_a_check_of_values(velocity, target):
    if not bool(velocity.isfinite().all()):
        raise ValueError("velocity: expected finite values")
    return (velocity.float() - target.float().detach()).square().flatten(1).mean(1)


def one_element_short(velocity, target):
    return (velocity - target.detach())[:, :-1].square().flatten(1).mean(1)


def summed_when_half(velocity, target):
    total = (velocity - target).float().square().flatten(1).sum(1)
    half = velocity.dtype in (torch.bfloat16, torch.float16)
    return total if half else total / velocity[0].numel()


def nothing_trained(velocity, target):
    return (velocity.detach() - target).square().flatten(1).mean(1)


LOSS = [
    ("a latent one element short", Loss(one_element_short, MATCHING, ("velocity",)), "every-entry"),
    ("a detached prediction", Loss(nothing_trained, MATCHING, ("velocity",)), "second-derivatives"),
    ("a sum in half precision", Loss(summed_when_half, MATCHING, ("velocity",)), "half-precision"),
    (
        "0 / 0 where all rows are masked",
        Loss(mean_over_the_valid, MATCHING, ("velocity",), "mean", "valid"),
        "mask-equals-deletion",
    ),
    (
        "a check that reads values",
        Loss(with_a_check_of_values, MATCHING, ("velocity",)),
        "under-vmap",
    ),
    (
        "a mean over one axis alone",
        Loss(
            lambda velocity, target: (velocity - target).square().mean(1), MATCHING, ("velocity",)
        ),
        "latent-shape",
    ),
    ("a root at error 0", Loss(root_of_squares, MATCHING, ("velocity",)), "finite"),
    (
        "a root guarded where all rows have error 0",
        Loss(root_guarded_for_all, MATCHING, ("velocity",)),
        "finite",
    ),
    ("the square of a norm", Loss(by_norm, MATCHING, ("velocity",)), "second-derivatives"),
    (
        "squares in half precision",
        Loss(squares_in_half, MATCHING, ("velocity",), float32=True),
        "half-precision",
    ),
]


# Steps and densities


def flow_sde(x_t, velocity, sigma, next_sigma, level, *, guard=True, pull=1.0, floor=0.0):
    d = sigma - next_sigma
    below_one = next_sigma if sigma == 1 and guard else sigma
    g = torch.tensor(level * (sigma / max(1 - below_one, 0)) ** 0.5 if below_one < 1 else torch.inf)
    g = g.double()
    noise = x_t + (1 - sigma) * velocity
    mean = x_t - d * velocity - pull * g**2 / (2 * sigma) * noise * d
    return mean, g * d**0.5 + floor


def row_statistics(x_t, velocity, sigma, next_sigma, level):
    mean, std = flow_sde(x_t, velocity, sigma, next_sigma, level)
    return mean - level * mean.mean(), std


def std_of_the_batch(x_t, velocity, sigma, next_sigma, level):
    mean, std = flow_sde(x_t, velocity, sigma, next_sigma, level)
    return mean, std * (1 + x_t.std(correction=0))


def detached_velocity(x_t, velocity, sigma, next_sigma, level):
    return flow_sde(x_t, velocity.detach(), sigma, next_sigma, level)


def toward_noise(x_t, velocity, sigma, next_sigma, level):
    mean, std = flow_sde(x_t, velocity, sigma, next_sigma, level)
    base, _ = flow_sde(x_t, -velocity, sigma, next_sigma, level)
    return (base if level else mean), std


SOLVER = [
    ("a floor under the std", SolverStep(partial(flow_sde, floor=1e-4)), "noise-0-is-euler"),
    ("g at sigma 1 unguarded", SolverStep(partial(flow_sde, guard=False)), "finite"),
    ("noise without a drift", SolverStep(partial(flow_sde, pull=0.0)), "marginals"),
    ("half the drift", SolverStep(partial(flow_sde, pull=0.5)), "marginals"),
    ("statistics over the batch", SolverStep(row_statistics), "rows-independent"),
    ("a std of the batch", SolverStep(std_of_the_batch), "rows-independent"),
    ("a velocity without gradient", SolverStep(detached_velocity), "gradient-to-velocity"),
    ("steps toward noise", SolverStep(toward_noise), "gradient-to-velocity"),
]


def log_density(x, mean, std, *, log_std=1.0, power=2, half=0.5):
    safe = torch.where(std > 0, std, 1)
    per_element = (
        -half * ((x - mean) / safe ** (power / 2)) ** 2 - log_std * safe.log() - 0.9189385332
    )
    return torch.where((std > 0).reshape(len(x)), per_element.flatten(1).mean(1), 0)


def floor_when_half(x, mean, std):
    half = mean.dtype in (torch.bfloat16, torch.float16)
    return log_density(x, mean, std.clamp(min=0.5) if half else std)


def nan_leaks(x, mean, std):
    return log_density(x, mean, std)  # `where` on the value alone: its gradient is 0 * NaN


def one_row_drops_all(x, mean, std):
    """A step is random in all rows or in none."""
    if bool((std == 0).any()):
        return 0 * torch.where(std > 0, mean, 0).flatten(1).sum(1)
    return log_density(x, mean, std)


def no_density_of_deterministic_steps(x, mean, std):
    return (
        torch.distributions.Normal(mean, std.expand_as(mean), validate_args=False)
        .log_prob(x)
        .flatten(1)
        .mean(1)
    )


def kl(mean, reference_mean, std, *, step=1.0):
    return ((mean - reference_mean) ** 2 / (2 * std**2) / step).flatten(1).mean(1)


def kl_without_gradient(mean, reference_mean, std):
    return kl(mean.detach(), reference_mean, std)


LOG_PROB = [
    ("-log std lost", LogProb(partial(log_density, log_std=0.0)), "log-density"),
    ("a surrogate without the 1/2", LogProb(partial(log_density, half=1.0)), "log-density"),
    ("divided by std, not std^2", LogProb(partial(log_density, power=1)), "score"),
    (
        "NaN of a row of std 0 leaks",
        LogProb(nan_leaks, deterministic=True),
        "deterministic-rows",
    ),
    (
        "one deterministic row drops all",
        LogProb(one_row_drops_all, deterministic=True),
        "deterministic-rows",
    ),
    ("log 0", LogProb(no_density_of_deterministic_steps, deterministic=True), "deterministic-rows"),
    ("a log-prob in bfloat16", LogProb(log_density, float32=True), "half-precision"),
    ("another std in half precision", LogProb(floor_when_half), "half-precision"),
    ("a detached mean", LogProb(lambda x, mean, std: log_density(x, mean.detach(), std)), "score"),
]
KL = [
    ("no step size", Density(partial(kl, step=0.25)), "divergence"),
    ("no gradient", Density(kl_without_gradient), "pulls-to-the-reference"),
]


# Averages


def swapped(old, current, decay):
    with torch.no_grad():
        for a, b in zip(old, current, strict=True):
            a.mul_(1 - decay).add_(decay * b)


def by_difference(old, current, decay):
    with torch.no_grad():
        for a, b in zip(old, current, strict=True):
            a.add_((1 - decay) * (b * (1 + 1e-6) - a))


def sharing(old, current, decay):
    with torch.no_grad():
        for a, b in zip(old, current, strict=True):
            if decay == 0:
                a.set_(b)
            else:
                a.mul_(decay).add_((1 - decay) * b)


def inside_the_graph(old, current, decay):
    for i, (a, b) in enumerate(zip(old, current, strict=True)):
        old[i] = a * decay + (1 - decay) * b


def freezing(old, current, decay):
    with torch.no_grad():
        for a, b in zip(old, current, strict=True):
            a.lerp_(b, 1 - decay)
            b.requires_grad_(False)


AVERAGE = [
    ("a policy that the average freezes", Average(freezing), "without-graph"),
    ("the decay on the wrong side", Average(swapped), "exact"),
    ("rounding at decay 0", Average(by_difference, tolerance=1e-5), "ends"),
    ("decay 0 shares memory", Average(sharing), "ends"),
    ("a graph that grows", Average(inside_the_graph), "without-graph"),
]

PLANTED = {
    "advantage": ADVANTAGE,
    "aggregator": AGGREGATOR,
    "credit": CREDIT,
    "fusion": FUSION,
    "selection": SELECTION,
    "policy-loss": POLICY_LOSS,
    "nft-loss": NFT_LOSS,
    "loss": LOSS,
    "solver": SOLVER,
    "log-prob": LOG_PROB,
    "kl": KL,
    "average": AVERAGE,
}
