"""Run in an interpreter of its own: the core with torch, einops, numpy and safetensors alone.

With one argument, a path to write to, it makes one update and runs the examples of all docstrings;
with a second one it runs that program instead, and prints which packages are loaded after it.
"""

import json
import runpy
import sys
import time
from importlib.machinery import PathFinder
from pathlib import Path

# What the core depends on, and what torch itself does.
PRESENT = {
    "_distutils_hack", "einops", "filelock", "fsspec", "functorch", "jinja2", "markupsafe",
    "mpmath", "mteditflow", "networkx", "numpy", "safetensors", "setuptools", "sympy", "torch",
    "torchgen", "typing_extensions",
}  # fmt: skip


def is_installed_package(file):
    return file is not None and "site-packages" in Path(file).parts


class Present(PathFinder):
    """Makes every other installed package look as if it were not there."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        spec = super().find_spec(name, path, target)
        hidden = spec is not None and is_installed_package(spec.origin)
        return None if hidden and name.partition(".")[0] not in PRESENT else spec


if __name__ == "__main__":  # pytest imports this file too, to look for doctests
    sys.meta_path[:] = [Present if finder is PathFinder else finder for finder in sys.meta_path]

import torch  # noqa: E402

torch.set_num_threads(1)
before, start = set(sys.modules), time.process_time()
import mteditflow as mt  # noqa: E402
import mteditflow.objectives  # noqa: E402

names = [getattr(mt, name) for name in mt.__all__]  # loaded on first use
seconds = time.process_time() - start
imported = {name.partition(".")[0] for name in set(sys.modules) - before}


def one_update_of_both_objectives(path):
    """Roll out a chain, save, load, score, fuse, broadcast, lose, step."""
    policy = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1e-2)

    def velocity(x_t, sigma, *, reference, turn):
        return policy(x_t) + turn * reference

    generators = mt.trajectory_generators(0, 8)
    solver = mt.FlowSDE(0.7)
    mt.rollout(
        velocity,
        mt.batched_noise((3, 4), generators),
        mt.shift_sigmas(mt.uniform_sigmas(5), 3.0),
        solver=solver,
        generators=generators,
        reduction="mean",
        reference=torch.randn(8, 4),
        group=torch.arange(8) // 4,
    ).save(path)
    trajectory = mt.Trajectory.load(path)

    success = (trajectory.clean > 0).any(dim=2)
    rewards = {
        "following": mt.binary_average(success, turn_mask=trajectory.turn_mask),
        "consistency": -trajectory.clean.square().mean(dim=(1, 2)),
    }
    advantage = mt.fuse_advantages(
        rewards, {"following": 1.0, "consistency": 0.2}, trajectory.group
    )

    b, n, _ = rows = trajectory.step_mask.nonzero(as_tuple=True)
    stored = trajectory.steps(*rows)
    reference = torch.where(n[:, None] > 0, trajectory.clean[b, n - 1], 0)
    replayed = policy(stored.x_t) + n[:, None] * reference
    transition = solver(stored.x_t, replayed, stored.sigma, stored.next_sigma)
    log_prob = mt.gaussian_log_prob(stored.next_x, *transition, reduction=trajectory.reduction)
    assert mt.check_ratio(
        log_prob.reshape(trajectory.log_prob.shape), trajectory.log_prob, clip=1e-4
    ).ok
    broadcast = mt.broadcast_to_steps(advantage, turns=3, steps=5)[rows]
    clipped = mt.clipped_surrogate_loss(
        log_prob, stored.log_prob, broadcast, clip_low=1e-4, clip_high=1e-4
    )

    clean, noise, sigma = trajectory.clean[:, 0], torch.randn(8, 4), torch.rand(8)
    v = policy(mt.interpolate(clean, noise, sigma))
    r = mt.optimality_probability(advantage)
    nft = mt.nft_loss(v, v.detach(), mt.velocity_target(clean, noise), r, nft_beta=1.0)

    weight = policy.weight.clone()
    (mt.masked_mean(clipped) + mt.masked_mean(nft)).backward()
    optimizer.step()
    assert policy.weight.isfinite().all()
    assert not torch.equal(policy.weight, weight)


def examples_of_every_docstring():
    """Doctests of all modules of floors 0 to 3; returns the numbers of failed and tried ones."""
    import doctest

    modules = [
        module
        for name, module in sorted(sys.modules.items())
        if name.startswith("mteditflow.") and module is not None
    ]
    results = [doctest.testmod(module) for module in modules]
    return sum(r.failed for r in results), sum(r.attempted for r in results)


def packages_loaded():
    """Return the names of the installed packages that are loaded now."""
    files = ((name, getattr(module, "__file__", None)) for name, module in sys.modules.items())
    names = {name.partition(".")[0] for name, file in files if is_installed_package(file)}
    return sorted(name for name in names if not name.startswith("__editable__"))


if __name__ == "__main__" and len(sys.argv) > 2:
    runpy.run_path(sys.argv[2], run_name="__main__")
    sys.stdout.write(json.dumps({"loaded": packages_loaded(), "present": sorted(PRESENT)}) + "\n")
elif __name__ == "__main__":
    one_update_of_both_objectives(sys.argv[1])
    failed, tried = examples_of_every_docstring()
    report = {
        "imported": sorted(imported),
        "seconds": seconds,
        "loaded": packages_loaded(),
        "present": sorted(PRESENT),
        "doctests": [failed, tried],
        "file": mt.__file__,
    }
    sys.stdout.write(json.dumps(report))
