"""Parts of a study: settings, claims that compare them, and findings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .worlds import SHAPES, World


@dataclass(frozen=True)
class Setting:
    """Options of the trainer in addition to a preset; equal settings share one run.

    Attributes:
        label: name in tables and figures.
        options: values by field, such as ``{"training.rounds": 3}``; "objective" is the name of
            another objective of the preset's kind.
        preset: name of the preset.
        script: program in ``examples/``.
        after: setting whose LoRA, of the same seed, the run starts from.
    """

    label: str
    options: Mapping[str, object] = field(default_factory=dict)
    preset: str = "shapes-nft"
    script: str = "train_flux.py"
    after: Setting | None = None

    @property
    def run(self) -> tuple[object, ...]:
        """Everything but the label: settings with equal values share one run."""
        after = None if self.after is None else self.after.run
        return self.script, self.preset, dict(self.options), after

    @property
    def words(self) -> list[str]:
        """Options as arguments of the command line, the objective first."""
        options = dict(self.options)
        objective = options.pop("objective", None)
        return [*([] if objective is None else [f"objective:{objective}"]), *words_of(options)]

    @property
    def name(self) -> str:
        """Name of the run's folder: script if not the default, preset, options and start."""
        scripts = [] if self.script == Setting.script else [Path(self.script).stem]
        changed = [f"{key}={value}" for key, value in sorted(self.options.items())]
        before = [] if self.after is None else ["after", self.after.name]
        words = [*scripts, self.preset, *changed, *before]
        return re.sub(r"[^a-z0-9=.]+", "-", "-".join(words).lower())


def words_of(options: Mapping[str, object]) -> list[str]:
    """Return fields by dotted name as the words of a command line."""
    words = []
    for name, value in options.items():
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:  # a switch has no value
            words.append(str(value))
    return words


@dataclass(frozen=True)
class Claim:
    """Claim that a metric is higher in one setting than in another, by their labels.

    With a margin, in points, the claim is non-inferiority: higher than the other minus the margin.
    """

    higher: str
    lower: str
    metric: str = "overall"
    margin: float = 0.0


@dataclass(frozen=True)
class Finding:
    """Compared settings, claims about them, and an explanation of the results."""

    name: str
    title: str
    settings: tuple[Setting, ...]
    claims: tuple[Claim, ...]
    paper: str = ""  # the paper's finding
    note: str = ""  # conditions of the comparison
    why: str = ""  # explanation, written by hand after the runs


@dataclass(frozen=True)
class HeldOut:
    """Held-out chains of one length.

    Attributes:
        turns: instructions of each chain.
        no_change: whether every turn asks for no change.
        part: divisor of the study's number of held-out chains, for long chains.
    """

    turns: int
    no_change: bool = False
    part: int = 1

    @property
    def name(self) -> str:
        """Part of the file names of evaluations."""
        return f"{'no-change-' if self.no_change else ''}{self.turns}-turns"

    @property
    def file(self) -> str:
        """File of chains in a world's folder."""
        return "no_change.jsonl" if self.no_change else "held_out.jsonl"


THREE, EIGHT = HeldOut(3), HeldOut(8)


@dataclass(frozen=True)
class Study:
    """Findings on one page.

    Attributes:
        name: name of the page, and of the folder of its runs.
        title: title of the page.
        base: setting that others are compared with.
        about: description of the base run.
        answer: conclusion in a paragraph, written by hand after the runs.
        findings: findings with their settings; these may include ``UNTRAINED``.
        longer: finding on longer chains; None: not evaluated.
        seeds: seeds of a full study.
        world: embedded world of training and evaluation.
        train_turns: instructions of the training chains on disk.
        held_out: held-out chains on which every setting is evaluated.
        rounds: rounds of a full run.
        chains: held-out chains of each length, in a full study.
        docs: folder of the page by default.
    """

    name: str
    title: str
    base: Setting
    about: str
    findings: tuple[Finding, ...]
    longer: Finding | None = None
    answer: str = ""
    seeds: tuple[int, ...] = (0, 1, 2)
    world: World = SHAPES
    train_turns: int = 3
    held_out: tuple[HeldOut, ...] = (THREE,)
    rounds: int = 20
    chains: int = 512
    docs: Path = Path("docs")

    @property
    def settings(self) -> dict[str, Setting]:
        """Trained settings by name, the base first.

        Raises:
            ValueError: two settings that differ have the same name, and thus the same run.
        """
        own = [self.base, *(s for finding in self.findings for s in finding.settings)]
        each = (x for s in own if s is not UNTRAINED for x in (s.after, s) if x is not None)
        found: dict[str, Setting] = {}
        for setting in each:
            if found.setdefault(setting.name, setting).run != setting.run:
                raise ValueError(f"settings: expected different names, got {setting.name} twice")
        return found


BASE_RUN = "base"  # value of teacher.path: the trained base run of the same seed
UNTRAINED = Setting("untrained", preset="untrained")
