"""Evaluations of held-out chains in the folder of a run: a file each, and images."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from accelerate import Accelerator
from PIL import Image

from mteditflow.chains import ChainDataset, EditedImages
from mteditflow.evaluation import Evaluation, JudgedBy, MadeBy
from mteditflow.evaluation.provenance import agreed

from .config import ConfigError

ROUND = re.compile(r"round-(\d{6,})")  # name of an evaluation, and of the folder of its images
# Fields of what made the images that two evaluations of a run must have in common, by the option.
SETTINGS = {
    "model.dtype": "dtype",
    "model.guidance": "guidance",
    "model.resolution": "resolution",
    "model.options": "call",
    "model.path": "editor_hash",
    "training.seed": "seed",
    "evaluation.steps": "steps",
}


class HeldOut:
    """Evaluations of a run: a file each, and the images of each turn of each chain.

    The images of a round lie as ``EditedImages`` has them, so that ``evaluate.py --images`` and
    ``score_chains.py`` read them too.

    Ranks take equal parts of the chains in order; the last is filled up with copies, which do not
    count. The folder is one that all ranks see.
    """

    def __init__(self, chains: ChainDataset, folder: Path, accelerator: Accelerator) -> None:
        self._chains, self.folder, self._accelerator = chains, folder, accelerator

    @property
    def chains(self) -> ChainDataset:
        """Records and references."""
        return self._chains

    def rows(self) -> list[int]:
        """Return this rank's chains; those of the last rank may be repeated."""
        ranks, rank = self._accelerator.num_processes, self._accelerator.process_index
        size = -(-len(self._chains) // ranks)
        return [min(row, len(self._chains) - 1) for row in range(rank * size, (rank + 1) * size)]

    def write(self, evaluation: Evaluation) -> None:
        """Write the scores; of images keep those of the first evaluation and of this one."""
        evaluation.write(self._file(evaluation.round))
        kept = [self._images(done).name for done in (min(self.rounds()), evaluation.round)]
        for folder in self.folder.iterdir():
            if ROUND.fullmatch(folder.name) and folder.is_dir() and folder.name not in kept:
                shutil.rmtree(folder)

    def all(self) -> list[Evaluation]:
        """Every evaluation of the run so far, in the order of rounds.

        Raises:
            ConfigError: a file is damaged; the message names it.
            OSError: one cannot be read.
        """
        return [self._read(done) for done in self.rounds()]

    def rounds(self) -> list[int]:
        """Return the rounds that have an evaluation, in order."""
        names = [ROUND.fullmatch(path.stem) for path in self.folder.glob("*.json")]
        return sorted(int(name[1]) for name in names if name)

    def strays(self) -> list[str]:
        """Return the names of what lies in the folder and is not of a run."""
        there = self.folder.iterdir() if self.folder.is_dir() else ()
        known = (x for x in there if not x.name.startswith("."))
        return sorted(x.name for x in known if not ROUND.fullmatch(x.name.removesuffix(".json")))

    def _read(self, done: int) -> Evaluation:
        try:
            evaluation = Evaluation.read(self._file(done))
            if evaluation.round != done:
                raise ValueError(
                    f"{self._file(done)}: expected an evaluation of round {done}, got one of round "
                    f"{evaluation.round}"
                )
            return evaluation
        except ValueError as error:
            raise ConfigError(f"{error}; delete this file to go on without it") from error

    def complete(self, done: int) -> bool:
        """Whether there is an evaluation of a round, none of whose chains lost a score."""
        path = self._file(done)
        if not path.exists():
            return False
        return not self._read(done).lost

    def rewind(self, done: int) -> None:
        """Forget evaluations of rounds that will be done again; -1 forgets all."""
        for later in self.rounds():
            if later > done:
                self._file(later).unlink()

    def require_comparable(self, done: int, success_at: float, made_by: MadeBy) -> None:
        """Raise unless evaluations up to a round can be compared with those to come.

        Args:
            done: the round after which the run goes on; later ones are made again.
            success_at: score from which on a turn was followed.
            made_by: what will make the images.

        Raises:
            ValueError: they are of other chains, another threshold or policy, or images made
                otherwise.
        """
        now: dict[str, object] = {"rewards.success": success_at}
        now["data.held_out"] = [(x.id, list(x.instructions)) for x in self._chains.chains]
        now |= _settings(made_by)
        for evaluation in [self._read(x) for x in self.rounds() if x <= done]:
            before = evaluation.provenance.made_by
            words = map(list, evaluation.instructions)
            was: dict[str, object] = {"rewards.success": evaluation.success_at}
            was["data.held_out"] = list(zip(evaluation.chain_ids, words, strict=True))
            was |= _settings(before)
            if evaluation.round == 0:  # all policies are the base model
                was["evaluation.policy"] = None
            known = (x for x in now if None not in (was[x], now[x]))
            if (name := next((x for x in known if was[x] != now[x]), None)) is not None:
                raise ValueError(
                    f"{name}: expected {_short(was[name])}, as in the evaluation of round "
                    f"{evaluation.round}, with which later ones are compared, got "
                    f"{_short(now[name])}"
                )

    def judge(self, judged_by: JudgedBy, done: int) -> JudgedBy:
        """Return the judge of the run: that of its evaluations up to a round, else this one.

        A server that does not say who it is, as while it starts, may be the same.

        Raises:
            ValueError: an evaluation was judged by another, or it is not known by whom.
        """
        before = [self._read(x).provenance.judged_by for x in self.rounds() if x <= done]
        for judge in before:
            if not judge.known:
                raise ValueError(f"expected {judged_by}, got an evaluation without provenance")
            agreed(judge, judged_by)
        return before[0] if before else judged_by

    def images(self, done: int) -> Images:
        """Images of an evaluation by row."""
        return Images(self._images(done), self._chains)

    def without_images(self, done: int) -> list[str]:
        """Return the ids of the chains of whose turns an evaluation has not every image."""
        edited = EditedImages(self._images(done))
        return [chain.id for chain in self._chains.chains if not edited.complete(chain)]

    def keep(self, done: int, row: int, images: Sequence[Image.Image]) -> None:
        """Write the images [reference, turn 1, ..., turn N] of a chain, without the first."""
        EditedImages(self._images(done)).write(self._chains.chains[row], images[1:])

    def _file(self, done: int) -> Path:
        return self.folder / f"round-{done:06d}.json"

    def _images(self, done: int) -> Path:
        return self.folder / f"round-{done:06d}"


def _settings(made_by: MadeBy) -> dict[str, object]:
    """Return what made images by option; None is not known."""
    policy = made_by.lora and made_by.lora.partition(" ")[0]
    return {
        "evaluation.policy": policy,
        **{option: getattr(made_by, name) for option, name in SETTINGS.items()},
    }


def _short(value: object) -> str:
    """Return a value in words; of chains their number and the first."""
    if isinstance(value, list):
        return f"{len(value)} chains from {value[0][0]!r} on" if value else "no chains"
    return repr(value)


class Images(Mapping[int, list[Image.Image | None]]):
    """Images [reference, turn 1, ..., turn N] of held-out chains by row, read when asked for."""

    def __init__(self, folder: Path, chains: ChainDataset) -> None:
        self._edited, self._chains = EditedImages(folder), chains

    def __getitem__(self, row: int) -> list[Image.Image | None]:
        return [self._chains[row].image, *self._edited.load(self._chains.chains[row])]

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))

    def __len__(self) -> int:
        return len(self._chains)
