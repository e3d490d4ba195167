"""The model card of an exported LoRA: origin, training, and measurements."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mteditflow
from mteditflow.evaluation import Evaluation
from mteditflow.objectives import OBJECTIVES
from mteditflow.training import Checkpoint

MARK = "<!-- written by mteditflow export -->"
SHOWN = ("objective", "sampling", "training")  # sections in the card; paths are shortened
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
USE = {
    "diffusers": """With this folder as the current one:

```python
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({base}, torch_dtype=torch.{dtype})
pipe.load_lora_weights(".", weight_name="{file}")
```""",
    "comfyui": "Put `{file}` into ComfyUI's `models/loras` and load it at strength 1: its scale, "
    "alpha / rank, is in the weights.",
}


@dataclass(frozen=True)
class Exported:
    """An exported LoRA and its run.

    Attributes:
        found: exported checkpoint.
        output: file of the LoRA.
        form: format of the file, "diffusers" or "comfyui".
    """

    found: Checkpoint
    output: Path
    form: str

    @property
    def config(self) -> dict[str, Any]:
        """Fields of the run by section."""
        return dict(self.found.state["config"])

    @property
    def run(self) -> Path:
        """Folder of the run."""
        return self.found.path.parent.parent

    def evaluations(self) -> list[Evaluation]:
        """Return the evaluations up to the checkpoint, in order.

        Raises:
            ValueError: one is damaged.
        """
        files = sorted((self.run / "evaluations").glob("round-*.json"))
        found = [Evaluation.read(file) for file in files]
        return [x for x in found if x.round <= self.found.round]

    def strip(self) -> Path | None:
        """Return the newest picture of chains up to the checkpoint; None: there is none.

        ``chains.png`` shows the last round, so earlier checkpoints get a picture from training.
        """
        last = self.run / "chains.png"
        if self.found.round == self.config["training"]["rounds"] and last.is_file():
            return last
        drawn = sorted((self.run / "pictures").glob("round-*-chains.png"))
        return next((x for x in reversed(drawn) if _round_of(x) <= self.found.round), None)


def model_card(exported: Exported, strip: str | None) -> str:
    """Return the card as Markdown, with front matter for Hugging Face.

    Args:
        exported: the LoRA.
        strip: file name of the picture next to the card; None: no picture.
    """
    config, base = exported.config, str(exported.config["model"]["path"])
    card = OBJECTIVES[config["objective"]["name"]].card
    parts = [
        _front_matter(base),
        MARK,
        f"# LoRA of {_short(base)}, trained by {card.title}",
        f"Reinforcement learning on chains of edits, with mteditflow {mteditflow.__version__}.",
        _table(("", ""), _facts(exported)),
        "## Use",
        USE[exported.form].format(
            file=exported.output.name,
            base=json.dumps(_short(base)),
            dtype=config["model"]["dtype"],
        ),
        "## Evaluation",
        *_evaluation(exported),
        "## Pictures",
        f"![chains of edits]({strip})" if strip else "The run has no picture of chains.",
        "## Not measured",
        "Judgments by people; images of other sizes, numbers of steps or base models than those "
        "above; anything that the tables above do not have.",
        "## Configuration",
        f"Of the rounds up to {exported.found.round}. Folders and addresses are left out.",
        f"```json\n{json.dumps(_shown(config), indent=1)}\n```",
        *_changes(exported.found.state.get("changes", ())),
    ]
    return "\n\n".join(parts) + "\n"


def _shown(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return sections of a configuration without paths of this machine."""
    shown = {name: dict(config[name]) for name in SHOWN}
    shown["sampling"] |= _few_steps(config)
    return shown


def _changes(changes: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a table of the options that a resumed run changed, those with paths left out."""
    shown = [x for x in changes if not x["option"].startswith("output.")]
    if shown:
        yield "The run was resumed with other options; the configuration above has the last ones:"
        values = (
            (
                str(x["after_round"]),
                f"`{x['option']}`",
                *(_value(x[when]) for when in ("was", "is")),
            )
            for x in shown
        )
        yield _table(("after round", "option", "before", "from then on"), values)


def _value(value: Any) -> str:
    """Return an option's value as text for a table; paths and addresses are left out."""
    text = json.dumps(value)
    return "(left out)" if "/" in text else f"`{text.replace('|', '')}`"


def _few_steps(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the sibling and few-step LoRA of sampling; older checkpoints have no such fields."""
    given = {name: config["sampling"].get(name) for name in ("model", "lora")}
    return {name: _short(str(path)) for name, path in given.items() if path is not None}


def _front_matter(base: str) -> str:
    known = HUB_ID.fullmatch(base) is not None and not Path(base).exists()
    lines = [f"base_model: {base}", "base_model_relation: adapter"] if known else []
    tags = "\n".join(f"- {tag}" for tag in ("lora", "reinforcement-learning", "image-editing"))
    return "\n".join(["---", *lines, "library_name: diffusers", f"tags:\n{tags}", "---"])


def _facts(exported: Exported) -> Iterator[tuple[str, str]]:
    """Yield name and value of each row of the card's table."""
    config, found = exported.config, exported.found
    model, data, training = config["model"], config["data"], config["training"]
    card = OBJECTIVES[config["objective"]["name"]].card
    papers = ", ".join(f"[{x}](https://arxiv.org/abs/{x})" for x in card.papers)
    yield "base model", _short(str(model["path"]))
    yield "method", f"{card.title}{f' ({papers})' if papers else ''}"
    policy = config["evaluation"]["policy"]
    yield "policy", f"{policy}, after round {found.round} of {training['rounds']}"
    above = ", trained above a frozen one; the file holds both" * (
        model.get("lora") is not None and model["lora_start"] == "freeze"
    )
    yield "LoRA", f"rank {model['lora_rank']}, alpha {model['lora_alpha']}{above}"
    if model.get("lora") is not None:
        done = {"continue": "trained on", "freeze": "frozen, and part of this file"}
        yield "started from", f"{_short(str(model['lora']))}, {done[model['lora_start']]}"
    if sampled := _few_steps(config):
        others = " and ".join(f"{name} {path}" for name, path in sampled.items())
        yield "sampled by", f"{others}, in {config['sampling']['steps']} steps"
    chains = (
        f"{data['groups']} chains of {data['turns']} turns, each sampled {data['group_size']} times"
    )
    yield "a round", f"{chains}; {found.state['updates']} optimizer steps in all"
    yield "images", f"{model['resolution']} pixels square, guidance {model['guidance']:g}"
    weights = config["rewards"]["weights"].items()
    yield "rewards", ", ".join(f"{name} {weight:g}" for name, weight in weights)


def _evaluation(exported: Exported) -> Iterator[str]:
    """Yield the section on evaluation: metrics of the first evaluation and of the last."""
    found = exported.evaluations()
    if not found:
        yield "None: up to this checkpoint no held-out chains were scored."
        return
    last = found[-1]
    yield (
        f"{len(last)} held-out chains, scored by {last.provenance.judged_by}. The policy of round "
        f"{last.round}"
        + ("." if last.round == exported.found.round else f", not of {exported.found.round}.")
        + " Per turn, with 95% intervals over chains; the metrics of following and consistency are "
        "in percent."
    )
    shown = {f"round {x.round}": x for x in (found[0], last)}  # one where they are the same
    turns = [f"turn {turn + 1}" for turn in range(last.turns)]
    rows = [
        (name.replace("_", " "), when, *_cells(evaluation, name))
        for name in last.names
        for when, evaluation in shown.items()
        if name in evaluation.metrics
    ]
    yield _table(("metric", "policy", *turns), rows)
    yield from _again(exported)


def _again(exported: Exported) -> Iterator[str]:
    """Yield the command that edits the held-out chains again, from the same noise."""
    config = exported.config
    model, data, scorer = config["model"], config["data"], config["rewards"]["scorer"]
    if data.get("fit", "square") != "square":
        yield "`mteditflow evaluate` has no buckets of sizes, so its numbers differ from these."
        return
    call = {"num_inference_steps": config["evaluation"]["steps"]}
    call |= _guidance(str(model["path"]), model["guidance"]) | model.get("options", {})
    options = {
        "--editor": _short(str(model["path"])),
        "--lora": exported.output.name,
        "--turns": data["turns"],
        "--resolution": model["resolution"],
        "--dtype": model["dtype"],
        "--history": data.get("history", "last"),
        "--seed": config["training"]["seed"],
        "--noise": "row",
        "--scorer": scorer,
    }
    words = [f"{name} {value}" for name, value in options.items() if value is not None]
    words += [f"--call {shlex.quote(f'{name}={json.dumps(x)}')}" for name, x in call.items()]
    judged = "" if scorer else ", add the options of the judge"
    yield (
        f"To score a policy under the same conditions and from the same noise{judged} (without "
        "`--noise row` a chain's noise is drawn by its id, and numbers differ):"
    )
    text = " \\\n    ".join(["mteditflow evaluate run HELD_OUT.jsonl", *words])
    yield f"```bash\n{text}\n```"


def _guidance(base: str, scale: float) -> dict[str, float]:
    """Return the guidance scale as an argument of the base model's call."""
    from .few_steps import guidance_call
    from .loading import family_of

    try:
        return guidance_call(scale, family_of(base))
    except (OSError, ValueError):  # the base model is gone, or its hub is not reached
        return {"guidance_scale": scale}


def _cells(evaluation: Evaluation, name: str) -> list[str]:
    """Return a metric at each turn, with its interval."""
    columns = (x.tolist() for x in evaluation.metrics[name])
    return [
        _cell(*numbers, count)
        for *numbers, count in zip(*columns, evaluation.counts[name], strict=True)
    ]


def _cell(value: float, low: float, high: float, count: int) -> str:
    """Return a number with its interval; a term of unknown range has none if all are alike.

    Example:
        >>> _cell(1.0, math.nan, math.nan, 4), _cell(math.nan, math.nan, math.nan, 0)
        ('1.00 [none: all 4 alike]', 'none of 0')
    """
    if math.isnan(value):
        return f"none of {count}"
    if math.isnan(low):
        return f"{value:.2f} [none: all {count} alike]"
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _short(path: str) -> str:
    """Return a Hub id as it is, or the last two parts of a path."""
    return "/".join(Path(path).parts[-2:])


def _round_of(picture: Path) -> int:
    return int(picture.name.split("-")[1])
