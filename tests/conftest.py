"""One torch thread per test worker, and the hypothesis profiles of the project.

`dev` is quick and explores anew each time; `ci` is the same on every run and looks further;
`mutation` is the same on every run, short, and does not shrink what it finds.
`HYPOTHESIS_PROFILE` chooses one; without it `CI` in the environment means `ci`.
"""

import os

import torch
from hypothesis import HealthCheck, Phase, settings

# Workers share the cores; threads inside them would only wait for each other.
torch.set_num_threads(1)

# A busy machine is slow, not wrong.
patient = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("dev", max_examples=50, **patient)
settings.register_profile("ci", max_examples=200, derandomize=True, **patient)
settings.register_profile(
    "mutation",
    max_examples=20,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    **patient,
)
settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if "CI" in os.environ else "dev")
)
