"""One torch thread per test worker, and the hypothesis profiles of the project.

`fixed` draws the same examples on every run: what `make test` and continuous integration use, so
that no change is turned away by chance. `random` explores anew each time (`make quick`). `mutation`
is fixed, short, and does not shrink. `HYPOTHESIS_PROFILE` chooses one; the default is `fixed`.
"""

import gc
import os

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis.internal.conjecture import providers

from tests.shrinking import first_cases, smallest_cases

__all__ = ["first_cases", "smallest_cases"]

# Workers share the cores; threads inside them would only wait for each other.
torch.set_num_threads(1)

# DeepSpeed, which accelerate imports when a model is saved, would say that it has chosen so.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

# A busy machine is slow, not wrong.
patient = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("fixed", max_examples=40, derandomize=True, **patient)
settings.register_profile("random", max_examples=50, **patient)
settings.register_profile(
    "mutation",
    max_examples=20,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    **patient,
)
# Hypothesis also draws the constants of project modules that have been imported so far. Which these
# are depends on the tests that a worker ran before, and so would the examples of a fixed profile.
providers.is_local_module_file = lambda path: False
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


def pytest_collection_finish():
    """Look for garbage in what tests make alone, not again in all that the test files import."""
    gc.freeze()
