"""Every argument of every public function refuses what is no value of its kind, by its own name.

The calls are those of the table in ``test_devices``, recorded; each argument of each is replaced.
"""

import inspect

import numpy as np
import pytest
import torch

import mteditflow as mt
from tests import test_devices as table

WRONG = {
    "a string": "abc",
    "None": None,
    "a masked array": np.ma.array([1.0, 2.0], mask=[False, True]),
    "a complex tensor": torch.ones(2, dtype=torch.complex64),
    "strings": ["a", "b"],
    "a sparse tensor": torch.ones(2).to_sparse(),
    "an array of objects": np.array([1.0, 2.0], dtype=object),
    "an array of long doubles": np.ones(2, dtype=np.longdouble),
    "an integer of 1329 bits": 10**400,
    "an object": object(),
}
# Checked by torch.distributed, and used where that is initialized alone.
NOT_OURS = {("gather_ranks", "process_group")}
# Ranks may gather complex tensors.
RIGHT = {("gather_ranks", "tensors", "a complex tensor")}


class Recorder:
    """Stands for the package in the table; keeps the arguments of each function's first call."""

    def __init__(self):
        self.calls = {}

    def __getattr__(self, name):
        value = getattr(mt, name)
        if not inspect.isfunction(value):
            return value

        def recorded(*arguments, **options):
            bound = inspect.signature(value).bind(*arguments, **options)
            self.calls.setdefault(name, (value, bound.arguments))
            return value(*arguments, **options)

        return recorded


def recorded_calls():
    recorder = Recorder()
    table.mt = recorder
    try:
        for call in table.CALLS.values():
            call()
    finally:
        table.mt = mt
    return recorder.calls


step = {"x_t": table.x, "velocity": table.y, "sigma": 0.5, "next_sigma": 0.25}
signals = {"signals": table.signals, "group": table.group}
CALLS = recorded_calls() | {
    "ODE()": (mt.ODE(), step),
    "FlowSDE()": (mt.FlowSDE(0.7), step),
    "TurnCredit()": (mt.TurnCredit(), {"reward": table.per_turn}),
    "TrajectoryCredit()": (mt.TrajectoryCredit(), {"reward": table.per_turn}),
    "RewardToGo()": (mt.RewardToGo(), {"reward": table.per_turn}),
    "Transition.sample": (mt.FlowSDE(0.7)(**step).sample, {"noise": table.z}),
    "RewardHistory.joined": (mt.RewardHistory(2).joined, signals),
    "RewardHistory.updated": (mt.RewardHistory(2).updated, signals),
    "Signal": (mt.Signal, {"value": table.reward, "valid": table.valid}),
    "FlowSDE": (mt.FlowSDE, {"noise_level": 0.7}),
    "CPS": (mt.CPS, {"noise_level": 0.7}),
    "LagrangeMultiplier": (mt.LagrangeMultiplier, {"floor": 0.5}),
    "AdaptiveKL": (mt.AdaptiveKL, {"target": 0.1, "value": 1.0}),
    "constrained_weights": (
        mt.constrained_weights, {"weights": table.weights, "multipliers": {"a": 1.0}}
    ),
    "draw_probabilities": (mt.draw_probabilities, {"spread": [0.0, 0.3]}),
    "ema_decay": (mt.ema_decay, {"update": 3, "maximum": 0.9}),
    "flux_mu": (mt.flux_mu, {"image_tokens": 256}),
    "flux2_mu": (mt.flux2_mu, {"image_tokens": 256, "steps": 4}),
    "old_policy_decay": (mt.old_policy_decay, {"update": 3, "slope": 0.1, "maximum": 0.5}),
    "token_tile": (mt.token_tile, {"latent": (6, 64), "size": (4, 6)}),
    "sliding_window": (mt.sliding_window, {"update": 0, "size": 2, "steps": 4}),
}  # fmt: skip


def replaced(function, arguments, parameter, value):
    """Call a function with one argument replaced; the first, of those without names."""
    chosen = dict(arguments)
    for name, kind in inspect.signature(function).parameters.items():
        if name == parameter:
            many = kind.kind is inspect.Parameter.VAR_POSITIONAL
            chosen[name] = (value, *arguments[name][1:]) if many else value
    bound = inspect.signature(function).bind_partial()
    bound.arguments |= chosen
    return function(*bound.args, **bound.kwargs)


def optional(kind):
    return kind.default is None or "None" in str(kind.annotation)


@pytest.mark.parametrize("name", sorted(CALLS))
def test_a_wrong_kind_is_refused_by_name(name):
    function, arguments = CALLS[name]
    replaced(function, arguments, None, None)  # right as it is
    unrefused = []
    for parameter, kind in inspect.signature(function).parameters.items():
        many = kind.kind is inspect.Parameter.VAR_POSITIONAL
        for what, value in WRONG.items():
            right = (name, parameter, what) in RIGHT or (value is None and optional(kind))
            if right or (name, parameter) in NOT_OURS:
                continue
            try:
                replaced(function, arguments, parameter, value)
                unrefused.append(f"{parameter} = {what}: accepted")
            except (TypeError, ValueError) as error:
                expected = f"{parameter}[0]" if many else parameter
                if not str(error).startswith(expected):
                    unrefused.append(f"{parameter} = {what}: {type(error).__name__}: {error}")
            except Exception as error:
                unrefused.append(f"{parameter} = {what}: raw {type(error).__name__}: {error}")
    assert not unrefused, "\n".join(unrefused)


def test_all_public_functions_are_called():
    public = {n for n in mt.__all__ if inspect.isfunction(getattr(mt, n))}
    assert public - set(CALLS) == {"update_old_policy"}  # takes parameters in place: its own tests
