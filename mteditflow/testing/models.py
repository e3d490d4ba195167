"""Laws of running averages, adapters, saved weights and replayed rollouts, on your own model.

They take callables that act on the model; only the laws of averages draw cases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DataObject
from torch import Tensor, nn

from mteditflow.testing.law import About, Laws, call, expect_close, fail
from mteditflow.testing.options import Subject
from mteditflow.testing.strategies import tensors


@dataclass(frozen=True)
class Average(Subject):
    """A running average of parameters under test.

    Attributes:
        function: called as ``function(old, current, decay)`` with two lists of tensors; changes
            ``old`` in place to ``decay * old + (1 - decay) * current``.
        tolerance: relative difference that counts as rounding.
    """

    tolerance: float = 1e-6


ADAPTER = About(
    "adapter-starts-as-no-op",
    "a fresh adapter changes no velocity, and can be trained",
    "Otherwise reference and current policy differ before the first update, or nothing trains.",
)
PARAMETERS = About(
    "parameters-are-the-trained-ones",
    "the optimizer gets each trained parameter once, and no other",
    "A parameter listed twice is updated and averaged twice; a missing one is never trained.",
)
REFERENCE = About(
    "reference-is-the-base-model",
    "the reference is the model without the adapter, also once the adapter has moved",
    "The KL term pulls toward a policy that is not the base model, or that drifts with training.",
)
SAVED = About(
    "saved-file-loads-to-the-same-velocity",
    "a saved file brings the same velocity back",
    "Keys that match no module are silently dropped, and the base model is evaluated.",
)
REPLAY = About(
    "fresh-rollout-replays-with-ratio-1",
    "the sampling policy reproduces the stored log-prob of each step",
    "Ratios that deviate by more than the clip range clip every row before the first update.",
)
#: Laws of running averages of parameters, for ``Average``.
AVERAGE: Laws[Average] = Laws(
    "average", Average, called="fn(old, current, decay), changes the tensors of old"
)


def _moved(
    f: Average, data: DataObject, decay: float, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    old = [data.draw(tensors((2,), dtype=dtype)), data.draw(tensors((1, 2), dtype=dtype))]
    current = [data.draw(tensors(tuple(x.shape), dtype=dtype)) for x in old]
    moved, given = [x.clone() for x in old], [x.clone() for x in current]
    case = {"old": old, "current": current, "decay": decay}
    call(f.function, case, moved, given, decay)
    if not all(torch.equal(a, b) for a, b in zip(given, current, strict=True)):
        fail(case, "current as it was", given)
    return old, current, moved, given


@AVERAGE.law(
    why="A decay applied to the wrong side makes the old policy follow immediately, or never.",
)
def exact(f: Average, data: DataObject) -> None:
    """Each parameter becomes decay * old + (1 - decay) * current."""
    decay = data.draw(st.integers(0, 8)) / 8
    old, current, moved, _ = _moved(f, data, decay)
    for before, target, got in zip(old, current, moved, strict=True):
        case = {"old": before, "current": target, "decay": decay}
        expect_close(got, decay * before + (1 - decay) * target, case, tolerance=f.tolerance)


@AVERAGE.law(
    why="On-policy training relies on a ratio of exactly 1 between equal policies.",
)
def ends(f: Average, data: DataObject) -> None:
    """Decay 0 copies and decay 1 keeps, bit for bit and without shared memory."""
    decay = data.draw(st.sampled_from([0.0, 1.0]))
    old, current, moved, given = _moved(f, data, decay)
    expected = current if decay == 0 else old
    case = {"old": old, "current": current, "decay": decay}
    for target, got in zip(expected, moved, strict=True):
        if not torch.equal(got, target):
            fail(case, target, got)
    for x in given:  # reveals results that share memory with current
        x.add_(1)
    if not all(torch.equal(a, b) for a, b in zip(moved, expected, strict=True)):
        fail(case, "old as it was when current moves on", moved)


@AVERAGE.law(
    why="A graph that grows with each update exhausts the memory after hours; a policy that the "
    "average has frozen stops training.",
)
def without_graph(f: Average, data: DataObject) -> None:
    """Parameters that require gradients are updated outside the graph, and still require them."""
    old = [nn.Parameter(data.draw(tensors((2,), dtype=torch.float32)))]
    current = [nn.Parameter(data.draw(tensors((2,), dtype=torch.float32)))]
    before = current[0].detach().clone()
    case = {"old": old[0].detach().clone(), "current": before, "decay": 0.5}
    call(f.function, case, old, current, 0.5)
    if not current[0].requires_grad or not torch.equal(current[0], before):
        got = current[0] if current[0].requires_grad else "one that is frozen"
        fail(case, "current as it was, and trained", got)
    if old[0].grad_fn is not None or not old[0].requires_grad:
        fail(case, "a leaf that needs a gradient", "a tensor inside a graph")


def check_average(function: Callable[..., Any], *, tolerance: float = 1e-6, **search: Any) -> None:
    """Check a running average of parameters, called as ``function(old, current, decay)``.

    Args:
        function: changes the tensors of ``old`` in place.
        tolerance: relative difference that counts as rounding.
        **search: ``examples``, ``seed``, ``only``, ``without``, as in ``Laws.results``.

    Raises:
        LawBroken: a law fails; the message has its smallest case.
        AssertionError: several laws fail.

    Source: DiffusionNFT (arXiv 2509.16117), soft update of the sampling policy.

    Example:
        >>> from mteditflow import update_old_policy
        >>> def average(old, current, decay):
        ...     update_old_policy(old, current, decay=decay)
        >>> check_average(average, examples=5)
    """
    AVERAGE.check(Average(function, tolerance), **search)


def check_adapter(
    model: nn.Module,
    velocity: Callable[[], Tensor],
    add: Callable[[], object],
    *,
    parameters: Callable[[], Iterable[Tensor]] | None = None,
    reference: Callable[[], Tensor] | None = None,
    tolerance: float = 0.0,
) -> None:
    """Check that a fresh adapter is a no-op, is trained alone, and gets a gradient.

    With ``reference``, the adapter's parameters are changed temporarily, to check that the velocity
    changes and the reference does not.

    Args:
        model: model that receives the adapter.
        velocity: runs the model on fixed inputs; called before and after ``add``.
        add: adds the adapter to the model.
        parameters: returns the optimizer's parameters, after ``add``; they must be the trained
            ones.
        reference: runs the model without the adapter on the same inputs, after ``add``.
        tolerance: largest relative difference of the velocity; 0 requires equal bits.

    Raises:
        LawBroken: the velocity changes, no parameter requires a gradient or none gets one, the
            optimizer's parameters are not the trained ones, or the reference is not the base model.

    Source: LoRA (arXiv 2106.09685), whose second factor starts at 0.

    Example:
        >>> base = torch.nn.Linear(2, 2)
        >>> class Adapter(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.a, self.b = torch.nn.Linear(2, 1), torch.nn.Linear(1, 2, bias=False)
        ...         torch.nn.init.zeros_(self.b.weight)
        ...     def forward(self, module, inputs, output):
        ...         return output + self.b(self.a(*inputs))
        >>> def add():
        ...     base.requires_grad_(False)
        ...     base.adapter = Adapter()
        ...     base.register_forward_hook(base.adapter)
        >>> check_adapter(base, lambda: base(torch.ones(1, 2)), add)
    """
    with torch.no_grad():
        before = velocity().clone()
    add()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    after = velocity()
    case = {"trained parameters": list(trained)[:4]}
    expect_close(after.detach(), before, case, tolerance=tolerance, about=ADAPTER)
    if not trained or not after.requires_grad:
        fail(
            case,
            "parameters that need a gradient",
            "none" if not trained else "none is used",
            ADAPTER,
        )
    # One nonzero gradient is enough: in a fresh LoRA only the factor that starts at 0 has one.
    grads = torch.autograd.grad(after.square().sum(), list(trained.values()), allow_unused=True)
    if not any(grad is not None and bool((grad != 0).any()) for grad in grads):
        fail(case, "a gradient other than 0 by an adapter's parameter", "none", ADAPTER)
    if parameters is not None:
        _expect_each_once(list(parameters()), trained)
    if reference is not None:
        _expect_base(reference, velocity, before, list(trained.values()), tolerance)


def _expect_each_once(given: list[Tensor], trained: dict[str, nn.Parameter]) -> None:
    names = {id(p): name for name, p in trained.items()}
    listed = sorted(names.get(id(p), "one that is not trained") for p in given)
    if listed != sorted(trained):
        wrong = [n for n in {*listed, *trained} if listed.count(n) != (n in trained)]
        got = {name: f"{listed.count(name)} times" for name in sorted(wrong)[:4]}
        fail({"trained parameters": len(trained)}, "each trained parameter once", got, PARAMETERS)


@torch.no_grad()
def _expect_base(
    reference: Callable[[], Tensor],
    velocity: Callable[[], Tensor],
    before: Tensor,
    trained: list[nn.Parameter],
    tolerance: float,
) -> None:
    expect_close(reference(), before, {"adapter": "fresh"}, tolerance=tolerance, about=REFERENCE)
    start = [p.clone() for p in trained]
    try:
        for p in trained:
            p.add_(0.1)
        moved, unmoved = velocity().clone(), reference().clone()
    finally:  # the user's model keeps its weights even if a function raises
        for p, value in zip(trained, start, strict=True):
            p.copy_(value)
    case = {"adapter": "moved by 0.1"}
    if torch.equal(moved, before):
        fail(case, "another velocity", "the same one", ADAPTER)
    expect_close(unmoved, before, case, tolerance=tolerance, about=REFERENCE)


def check_saved(
    velocity: Callable[[], Tensor],
    change: Callable[[], object],
    save: Callable[[], object],
    load: Callable[[], object],
    *,
    elsewhere: Callable[[], Tensor] | None = None,
    tolerance: float = 0.0,
) -> None:
    """Check that a saved file brings the same velocity back.

    Args:
        velocity: runs the policy on fixed inputs.
        change: changes the policy, as an update does.
        save: writes the policy.
        load: reads it back.
        elsewhere: loads the file by other software, such as into a plain pipeline, and returns its
            velocity on the same inputs; a lost LoRA scale is only visible there.
        tolerance: largest relative difference of the velocity; 0 requires equal bits.

    Raises:
        LawBroken: ``change`` changes no velocity, so that the check would prove nothing, or the
            velocity after ``load``, or ``elsewhere``, differs from that at ``save``.

    Source: conventions of this library; see docs/testing.md.

    Example:
        >>> model = torch.nn.Linear(1, 1)
        >>> held = {}
        >>> check_saved(
        ...     lambda: model(torch.ones(1, 1)),
        ...     lambda: torch.nn.init.normal_(model.weight),
        ...     lambda: held.update({k: v.clone() for k, v in model.state_dict().items()}),
        ...     lambda: model.load_state_dict(held),
        ... )
    """
    with torch.no_grad():
        untrained = velocity().clone()
        change()
        saved = velocity().clone()
        if torch.equal(untrained, saved):
            fail({}, "another velocity after the change", "the same one", SAVED)
        save()
        if elsewhere is not None:
            case = {"after": "load elsewhere"}
            expect_close(elsewhere(), saved, case, tolerance=tolerance, about=SAVED)
        change()  # otherwise a load that does nothing would pass
        if torch.equal(velocity(), saved):
            fail({}, "another velocity after the second change", "the same one", SAVED)
        load()
        expect_close(velocity(), saved, {"after": "load"}, tolerance=tolerance, about=SAVED)


def check_replay(
    log_prob: Callable[[], Tensor], old_log_prob: Tensor, *, allowed: float = 1e-5
) -> None:
    """Check that a fresh rollout replays with ratio 1 and a gradient.

    Args:
        log_prob: log-probs of the stored steps under the policy that just sampled them.
        old_log_prob: the log-probs that the rollout stored, same shape.
        allowed: largest deviation of a ratio from 1; set it below the clip range.

    Raises:
        LawBroken: a ratio deviates, is not finite, or the replay has no gradient.

    Source: Flow-GRPO (arXiv 2505.05470); its users report ratios off by 2e-5 to 5e-4.

    Example:
        >>> old = torch.tensor([-1.0, -2.0])
        >>> check_replay(lambda: old.clone().requires_grad_(), old)
    """
    replayed = log_prob()
    ratio = (replayed.detach().double() - old_log_prob.double()).exp()
    case: dict[str, object] = {"old_log_prob": old_log_prob, "allowed deviation": allowed}
    if replayed.shape != old_log_prob.shape:
        fail(case, f"shape {list(old_log_prob.shape)}", f"shape {list(replayed.shape)}", REPLAY)
    if not bool(((ratio - 1).abs() <= allowed).all()):
        fail(case, "ratios of 1", ratio, REPLAY)
    if not replayed.requires_grad:
        fail(case, "a gradient to the policy", "a replay without gradient", REPLAY)
