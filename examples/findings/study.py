"""Parts of a study: settings, claims of which is higher, findings on a page."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .worlds import SHAPES, World


@dataclass(frozen=True)
class Setting:
    """Options of the trainer over a preset; equal ones are one run, whoever compares it.

    Attributes:
        label: name in tables and figures.
        options: field to value, such as ``{"training.rounds": 3}``; "objective" is the name of
            another objective of the preset's kind.
        preset: name of the preset.
        script: program in ``examples/``.
        after: setting whose LoRA, of the same seed, the run goes on from.
    """

    label: str
    options: Mapping[str, object] = field(default_factory=dict)
    preset: str = "shapes-nft"
    script: str = "train_flux.py"
    after: Setting | None = None

    @property
    def words(self) -> list[str]:
        """The options as the command line takes them, the objective first."""
        options = dict(self.options)
        objective = options.pop("objective", None)
        return [*([] if objective is None else [f"objective:{objective}"]), *words_of(options)]

    @property
    def name(self) -> str:
        """Name of the run's folder: script, unless it is the usual one, preset and options."""
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

    With a margin, in points: that it is higher than the other's less the margin (non-inferiority).
    """

    higher: str
    lower: str
    metric: str = "overall"
    margin: float = 0.0


@dataclass(frozen=True)
class Finding:
    """Settings that are compared, what is claimed of them, and why it differs here."""

    name: str
    title: str
    settings: tuple[Setting, ...]
    claims: tuple[Claim, ...]
    paper: str = ""  # what the paper says of it
    note: str = ""  # what a reader must know of the comparison
    why: str = ""  # written by hand after the runs


@dataclass(frozen=True)
class HeldOut:
    """Held-out chains of one length.

    Attributes:
        turns: instructions of each.
        no_change: whether every turn asks for no change.
        part: one of how many of the study's held-out chains; long ones take long.
    """

    turns: int
    no_change: bool = False
    part: int = 1

    @property
    def name(self) -> str:
        """Part of the names of files of evaluations."""
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
        name: of the page, and of the folder of its runs.
        title: of the page.
        base: the setting that others are compared with.
        about: what the base run is, in words.
        answer: what the study says, in a paragraph; written by hand after the runs.
        findings: with their settings; `UNTRAINED` may be among them.
        longer: what the paper says of longer chains, and why it differs here; None: not looked at.
        seeds: seeds of a full study.
        world: embedded world that it trains in.
        train_turns: instructions of the chains on disk that are trained on.
        held_out: chains that every setting is evaluated on.
        rounds: rounds of a full run.
        chains: held-out chains of each length, in a full study.
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

    @property
    def settings(self) -> dict[str, Setting]:
        """Trained settings by name, the base first."""
        own = [self.base, *(s for finding in self.findings for s in finding.settings)]
        each = (x for s in own if s is not UNTRAINED for x in (s.after, s) if x is not None)
        return {s.name: s for s in each}


BASE_RUN = "base"  # as a teacher: what the base run of the same seed has become
UNTRAINED = Setting("untrained", preset="untrained")
