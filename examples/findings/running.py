"""Train every setting with every seed in a subprocess, then evaluate it exactly.

Finished runs with the same settings are kept, and interrupted ones resumed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Any

from mteditflow_examples.flux.command_line import parse
from mteditflow_examples.flux.config import Config, ConfigError, DistillationConfig
from mteditflow_examples.flux.config_values import dumped, typed
from PIL.Image import Image
from tqdm import tqdm

from mteditflow.evaluation import Evaluation
from mteditflow.training import Checkpoints, read_metrics

from .study import BASE_RUN, EIGHT, THREE, HeldOut, Setting, Study, words_of

SCRIPTS = Path(__file__).parents[1]
PARSING = Lock()  # tyro's parser is not thread-safe
EVALUATING = Lock()  # libraries patch torch.nn.Module for all threads while one loads a model
PLACES = {  # fields with paths, which may differ between equal runs; None: the whole section
    "model": ("path", "lora"),
    "data": ("chains", "held_out"),
    "teacher": ("path",),
    "output": None,
}


@dataclass(frozen=True)
class Form:
    """Size of a study."""

    seeds: tuple[int, ...]
    rounds: int
    train: int  # training chains
    held_out: int  # held-out chains of each length


FULL = Form((0, 1, 2), rounds=20, train=480, held_out=512)
SHORT = Form((0,), rounds=4, train=96, held_out=64)


@dataclass(frozen=True, eq=False)
class Run:
    """Evaluations and metrics of a setting with a seed.

    Attributes:
        before: evaluation of the untrained model, with the run's denoising steps.
        after: evaluation on the same chains after training.
        metrics: metrics of each round.
    """

    before: Evaluation
    after: Evaluation
    metrics: Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class Ablations:
    """Runs of a study of one size, in a folder."""

    folder: Path
    form: Form
    study: Study
    _trainers: set[subprocess.Popen] = field(default_factory=set)
    _held: dict[tuple[str, int], Lock] = field(default_factory=dict)

    def run_all(self, workers: int) -> list[str]:
        """Run missing jobs, seed by seed, ``workers`` at a time; stop all trainers on interruption.

        Returns:
            One message per failed run; a failure does not stop the other runs.
        """
        for seed in self.form.seeds:
            self._write_chains(seed)
        pool = ThreadPoolExecutor(workers)
        try:
            done = pool.map(lambda job: self._attempt(*job), self._jobs)
            return [x for x in tqdm(done, total=self.total, unit="run") if x is not None]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for trainer in list(self._trainers):
                trainer.terminate()

    @property
    def total(self) -> int:
        """Number of runs of all settings with all seeds."""
        return len(self._jobs)

    @property
    def _jobs(self) -> list[tuple[Setting, int]]:
        """Every setting with every seed, seed by seed."""
        settings = self.study.settings.values()
        return [(setting, seed) for seed in self.form.seeds for setting in settings]

    def missing(self) -> list[tuple[Setting, int]]:
        """Return the settings and seeds that lack an evaluation."""
        return [
            (setting, seed)
            for setting, seed in self._jobs
            if not all(self._after(setting, seed, x).exists() for x in self._lengths(setting))
        ]

    def complete_seeds(self) -> list[int]:
        """Return the seeds for which every setting is complete."""
        missing = {seed for _, seed in self.missing()}
        return [seed for seed in self.form.seeds if seed not in missing]

    def other_runs(self) -> list[str]:
        """Return one message per existing run that was trained with options of another setting."""
        found = (self._other_run(setting, seed) for setting, seed in self._jobs)
        return [message for message in found if message is not None]

    def result(self, setting: Setting, seed: int, held_out: HeldOut = THREE) -> Run:
        """Read the evaluations and metrics of a complete run.

        Raises:
            ValueError: the evaluation is of another round than the setting's last, or of other
                chains than that of the untrained model.
        """
        steps, path = (
            self._config(setting, seed).evaluation.steps,
            self._after(setting, seed, held_out),
        )
        before, after = Evaluation.read(self._before(seed, steps, held_out)), Evaluation.read(path)
        if after.round != (last := self._asked(setting)):
            raise ValueError(f"{path}: expected round {last}, got {after.round}; remove it")
        if (after.chain_ids, after.instructions) != (before.chain_ids, before.instructions):
            raise ValueError(f"{path}: expected the chains of the untrained model, got others")
        return Run(before, after, read_metrics(self._run(setting, seed) / "metrics.jsonl"))

    def images(
        self, setting: Setting | None, seed: int, held_out: HeldOut, rows: Sequence[int]
    ) -> list[list[Image]]:
        """Edit some held-out chains with a run's LoRA; None: with the untrained model."""
        adapter = None if setting is None else self._lora(setting, seed)
        edit, chains = self.study.world.edit, self._chains(seed, held_out)
        return edit(self._world(seed) / "model", chains, seed=seed, adapter=adapter, rows=rows)[1]

    def arguments(self, setting: Setting, seed: int) -> list[str]:
        """Return the arguments of the trainer's command line."""
        world, output = self._world(seed), self._run(setting, seed)
        given: dict[str, object] = {
            "model.path": world / "model",
            "data.chains": world / "train.jsonl",
            "data.held_out": None,
            "training.rounds": self._asked(setting),
            "training.seed": seed,
            "safety.collapse_drop": 1,  # never stop: a collapse is a result, too
            "output.folder": output,
            "output.keep": 1,
            "output.strips_every": 0,
        }
        if (every := setting.options.get("growth.every")) is not None:  # as often in short runs
            setting = replace(
                setting, options={**setting.options, "growth.every": self._scaled(int(str(every)))}
            )
        if setting.after is not None:
            given["model.lora"] = self._lora(setting.after, seed)
        if setting.options.get("teacher.path") == BASE_RUN:
            teacher = {"teacher.path": self._lora(self.study.base, seed)}
            setting = replace(setting, options={**setting.options, **teacher})
        options = {k: x for k, x in setting.options.items() if k != "training.rounds"}
        if taken := sorted(options.keys() & given.keys()):
            raise ValueError(
                f"{taken[0]}: expected no option of a setting, got {options[taken[0]]}"
            )
        own = replace(setting, options=options).words
        return [setting.preset, "--output.trackers", *words_of(given), *own]

    def _asked(self, setting: Setting) -> int:
        """Return the rounds of a setting, its own or the study's."""
        return self._scaled(int(str(setting.options.get("training.rounds", self.study.rounds))))

    def _scaled(self, rounds: int) -> int:
        """Return a number of rounds of a full study for runs of this form."""
        return max(1, rounds * self.form.rounds // self.study.rounds)

    def _lora(self, setting: Setting, seed: int) -> Path:
        """Return the folder of a run's final LoRA."""
        return self._run(setting, seed) / f"checkpoints/round-{self._asked(setting):06d}" / "lora"

    def _needs(self, setting: Setting) -> list[Setting]:
        """Return the settings whose runs of the same seed must precede a run."""
        taught = setting.options.get("teacher.path") == BASE_RUN
        before = [self.study.base if taught else None, setting.after]
        return [x for x in before if x is not None]

    def _attempt(self, setting: Setting, seed: int) -> str | None:
        """Train and evaluate unless done; return an error message, if any."""
        try:
            self._train(setting, seed)
            with EVALUATING:
                for held_out in self._lengths(setting):
                    self._evaluate(setting, seed, held_out)
        except (OSError, RuntimeError, ValueError) as error:
            return f"{setting.name}, seed {seed}: {error}"
        return None

    def _lengths(self, setting: Setting) -> tuple[HeldOut, ...]:
        """Return the held-out chains of a setting; the base run's may include longer ones."""
        longer = self.study.longer is not None and setting.name == self.study.base.name
        return (*self.study.held_out, EIGHT) if longer else self.study.held_out

    def _train(self, setting: Setting, seed: int) -> None:
        """Train to the last round, after the runs that this one starts from.

        Raises:
            ValueError: the existing run has other settings.
            RuntimeError: the trainer failed, or was stopped.
        """
        for before in self._needs(setting):
            self._train(before, seed)
        with self._training(setting, seed):
            self._train_alone(setting, seed)

    def _training(self, setting: Setting, seed: int) -> Lock:
        """Return the lock of a run, so that only one thread trains it."""
        with PARSING:
            return self._held.setdefault((setting.name, seed), Lock())

    def _train_alone(self, setting: Setting, seed: int) -> None:
        """Train to the last round in a subprocess, unless done."""
        if self._rounds(setting, seed) < self._asked(setting):
            script = SCRIPTS / setting.script
            command = [sys.executable, str(script), *self.arguments(setting, seed)]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
            with subprocess.Popen(command, env=environment, text=True, **pipes) as trainer:
                self._trainers.add(trainer)
                said = trainer.communicate()[1]
            self._trainers.discard(trainer)
            if trainer.returncode or self._rounds(setting, seed) < self._asked(setting):
                raise RuntimeError(f"{' '.join(command)} failed:\n{said[-2000:]}")

    def _rounds(self, setting: Setting, seed: int) -> int:
        """Return the number of saved rounds.

        Raises:
            ValueError: they were trained with other settings.
        """
        if (other := self._other_run(setting, seed)) is not None:
            raise ValueError(other)
        found = Checkpoints(self._run(setting, seed) / "checkpoints").find("auto")
        return 0 if found is None else found.round

    def _other_run(self, setting: Setting, seed: int) -> str | None:
        """Return a message if the run on disk is of other options; None if of these, or missing."""
        folder = self._run(setting, seed)
        found = Checkpoints(folder / "checkpoints").find("auto")
        if found is None:
            return None
        difference = _difference(found.state["config"], self._config(setting, seed))
        if difference is None:
            return None
        return (
            f"{folder}: expected a run of {setting.label!r}, got another; remove it ({difference})"
        )

    def _evaluate(self, setting: Setting, seed: int, held_out: HeldOut) -> None:
        """Evaluate a run and the untrained model, unless done."""
        steps = self._config(setting, seed).evaluation.steps
        world, chains = self._world(seed), self._chains(seed, held_out)
        before, after = self._before(seed, steps, held_out), self._after(setting, seed, held_out)
        common: dict[str, Any] = {"seed": seed, "steps": steps}
        evaluate = self.study.world.evaluate
        if not before.exists():
            evaluate(world / "model", chains, **common).write(before)
        if not after.exists():
            adapter = Checkpoints(self._run(setting, seed) / "checkpoints").find("auto").path
            common |= {"adapter": adapter / "lora", "rounds": self._asked(setting)}
            evaluate(world / "model", chains, **common).write(after)

    def _write_chains(self, seed: int) -> None:
        """Write the editor and the chains of a seed, unless they exist."""
        trained = self.study.train_turns
        longer = () if self.study.longer is None else (EIGHT,)
        parts = {trained: 1} | {x.turns: x.part for x in (*self.study.held_out, *longer)}
        for turns, part in sorted(parts.items(), reverse=True):
            folder = self._folder(seed, turns)
            held_out = max(1, self.form.held_out // part)
            counts = (self.form.train if turns == trained else 1, held_out)
            if not (folder / self.study.world.last).exists():
                self.study.world.write(folder, seed=seed, counts=counts, turns=turns)

    def _config(self, setting: Setting, seed: int) -> Config:
        kind = Config if setting.script == Setting.script else DistillationConfig
        with PARSING:
            return parse(self.arguments(setting, seed), kind)

    def _world(self, seed: int) -> Path:
        return self._folder(seed, self.study.train_turns)

    def _folder(self, seed: int, turns: int) -> Path:
        return self.folder / f"world-{seed}-turns-{turns}"

    def _chains(self, seed: int, held_out: HeldOut) -> Path:
        return self._folder(seed, held_out.turns) / held_out.file

    def _run(self, setting: Setting, seed: int) -> Path:
        return self.folder / f"{setting.name}-{seed}"

    def _before(self, seed: int, steps: int, held_out: HeldOut = THREE) -> Path:
        kind = "no-change-" if held_out.no_change else ""
        return self._folder(seed, held_out.turns) / f"before-{kind}{steps}-steps.json"

    def _after(self, setting: Setting, seed: int, held_out: HeldOut = THREE) -> Path:
        return self._run(setting, seed) / f"after-{held_out.name}.json"


def _difference(before: Mapping[str, Any], config: Config) -> str | None:
    """Return the first difference of a checkpoint's configuration, paths aside; None if equal."""
    try:
        # Fields newer than the checkpoint get their defaults.
        old = _without_places(typed(before, type(config)))
    except ConfigError as error:  # the checkpoint has fields that no longer exist
        return str(error)
    for section, fields in _without_places(config).items():
        for name, value in fields.items():
            if old[section].get(name) != value:
                return f"{section}.{name}: {old[section].get(name)} in place of {value}"
    return None


def _without_places(config: Config) -> dict[str, Any]:
    """Return the fields of a configuration without paths."""
    kept: dict[str, Any] = {}
    for section, values in dumped(config).items():
        places = PLACES.get(section, ())
        if places is not None:
            kept[section] = {name: x for name, x in values.items() if name not in places}
    return kept
