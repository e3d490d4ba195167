"""The worked examples: ``python -m docs.render_importing`` runs them and writes importing.md.

The code shown is that of the files in examples/importing, whole; below it is what they printed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

DOCS = Path(__file__).parent
PAGE, FOLDER = DOCS / "importing.md", DOCS.parent / "examples" / "importing"

TITLES = {
    "lora_script": "`nft_loss` in a LoRA training script",
    "numpy_advantages": "Advantages of rewards in numpy",
    "own_log_probs": "The clipped surrogate where log-probs exist already",
    "sde_sampling": "SDE sampling with a plain pipeline",
}

INTRODUCTION = """\
# Importing into code that you have

Made by `python -m docs.render_importing`; do not edit. Four files of
[`examples/importing`](../examples/importing), complete, with their output;
`tests/test_importing.py` runs each. They run in a clone after `pip install -e '.[train]'`. Every
name is documented on [the API page](api.md); [a training loop](loop.md) has one objective in place
of single losses, GRPO over [your own sampler](loop.md#over-your-own-sampler-flow-grpo), and the way
[from scores per turn to an advantage](loop.md#from-your-own-scores-to-an-advantage).

| you have | you add |
|---|---|
| [a LoRA training script](#nft_loss-in-a-lora-training-script) | \
`group_advantage`, `optimality_probability`, `nft_loss` |
| [rewards in numpy](#advantages-of-rewards-in-numpy) | `group_advantage`, `fuse_advantages` |
| [a trainer with log-probs](#the-clipped-surrogate-where-log-probs-exist-already) | \
`clipped_surrogate_loss`, `check_ratio`, `clip_fraction`, `approximate_kl` |
| [a pipeline](#sde-sampling-with-a-plain-pipeline) | `FlowMatchSDEScheduler`, `FlowSDE`, \
`sliding_window` |
"""

PICTURE = """\
![One edit, eight tries: a row for each noise level, the source at the left](sde_sampling.png)
"""


def page(printed: Mapping[str, str]) -> str:
    """Write the page, given what each example printed."""
    parts = [INTRODUCTION]
    for name, title in TITLES.items():
        code = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
        parts.append(f"## {title}\n\n```python\n{code}```\n\n```text\n{printed[name]}```\n")
    return "\n".join([*parts, PICTURE])


def read_printed(text: str) -> dict[str, str]:
    """Return the output of each example by a page."""
    return dict(zip(TITLES, re.findall(r"^```text\n(.*?)^```", text, re.M | re.S), strict=True))


def run(name: str) -> str:
    """Run an example as a reader would, in this folder, and return what it printed."""
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parent)}
    command = [sys.executable, str(FOLDER / f"{name}.py")]
    return subprocess.run(
        command, cwd=DOCS, env=environment, stdout=subprocess.PIPE, text=True, check=True
    ).stdout


def main() -> None:
    """Run all examples and write the page; the picture is written by its example."""
    PAGE.write_text(page({name: run(name) for name in TITLES}), encoding="utf-8")


if __name__ == "__main__":
    main()
