"""Storage of held-out evaluations in a run's folder: one file per evaluation, and images."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from mteditflow.chains import ChainDataset, EditedImages
from mteditflow.evaluation import Evaluation, JudgedBy, MadeBy
from mteditflow.evaluation.provenance import agreed

from .config import ConfigError

if TYPE_CHECKING:  # evaluate --help imports this module, and accelerate is slow
    from accelerate import Accelerator

HELD_OUT = "held out"  # purpose of the noise; its key is (seed, purpose, row)
ROUND = re.compile(r"round-(\d{6,})")  # name of an evaluation file, and of its image folder
# Fields of MadeBy that all evaluations of a run must share, by the option that sets them.
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
    """Evaluations of a run: one file per evaluation, and one image per turn and chain.

    Images have the layout of ``EditedImages``, so ``evaluate.py --images`` and ``score_chains.py``
    read them, too. Ranks take equal, contiguous parts of the chains; the last part is padded with
    copies that do not count. All ranks must see the folder.
    """

    def __init__(self, chains: ChainDataset, folder: Path, accelerator: Accelerator) -> None:
        self._chains, self.folder, self._accelerator = chains, folder, accelerator

    @property
    def chains(self) -> ChainDataset:
        """Held-out chains with their references."""
        return self._chains

    def rows(self) -> list[int]:
        """Return the rows of this rank's chains; the last row may repeat as padding.

        Every rank gets equally many, since the calls per batch are collective.
        """
        ranks, rank = self._accelerator.num_processes, self._accelerator.process_index
        size = -(-len(self._chains) // ranks)  # rounded up
        return [min(row, len(self._chains) - 1) for row in range(rank * size, (rank + 1) * size)]

    def write(self, evaluation: Evaluation) -> None:
        """Write the scores; keep images of the first evaluation and of this one only."""
        evaluation.write(self._file(evaluation.round))
        kept = [self._images(done).name for done in (min(self.rounds()), evaluation.round)]
        for folder in self.folder.iterdir():
            if ROUND.fullmatch(folder.name) and folder.is_dir() and folder.name not in kept:
                shutil.rmtree(folder)

    def all(self) -> list[Evaluation]:
        """Return all evaluations of the run so far, by round.

        Raises:
            ConfigError: a file is damaged; the message names it.
            OSError: a file cannot be read.
        """
        return [self._read(done) for done in self.rounds()]

    def rounds(self) -> list[int]:
        """Return the rounds that have an evaluation, in order."""
        names = [ROUND.fullmatch(path.stem) for path in self.folder.glob("*.json")]
        return sorted(int(name[1]) for name in names if name)

    def strays(self) -> list[str]:
        """Return the names of files in the folder that no run writes, hidden ones left out."""
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
        """Whether a round has an evaluation without lost scores."""
        path = self._file(done)
        if not path.exists():
            return False
        return not self._read(done).lost

    def rewind(self, done: int) -> None:
        """Delete evaluations of rounds after ``done``, which will be repeated; -1 deletes all."""
        for later in self.rounds():
            if later > done:
                self._file(later).unlink()

    def require_comparable(self, done: int, success_at: float, made_by: MadeBy) -> None:
        """Raise unless evaluations up to a round are comparable with future ones.

        Args:
            done: round that the run resumes after; later evaluations are repeated.
            success_at: score from which a turn counts as followed.
            made_by: provenance of future images.

        Raises:
            ValueError: the chains, the threshold, the policy or the settings of the images differ.
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
            if evaluation.round == 0:  # before training all policies are equal
                was["evaluation.policy"] = None
            known = (x for x in now if None not in (was[x], now[x]))  # None: not recorded
            if (name := next((x for x in known if was[x] != now[x]), None)) is not None:
                raise ValueError(
                    f"{name}: expected {_short(was[name])}, as in the evaluation of round "
                    f"{evaluation.round}, with which later ones are compared, got "
                    f"{_short(now[name])}"
                )

    def judge(self, judged_by: JudgedBy, done: int) -> JudgedBy:
        """Return the judge of the evaluations up to a round; without any, ``judged_by``.

        A server without identity, for example while it starts, is taken to be the same.

        Raises:
            ValueError: an evaluation has another judge, or no provenance.
        """
        before = [self._read(x).provenance.judged_by for x in self.rounds() if x <= done]
        for judge in before:
            if not judge.known:
                raise ValueError(f"expected {judged_by}, got an evaluation without provenance")
            agreed(judge, judged_by)
        return before[0] if before else judged_by

    def images(self, done: int) -> Images:
        """Return the images of an evaluation by row, loaded on access."""
        return Images(self._images(done), self._chains)

    def without_images(self, done: int) -> list[str]:
        """Return the ids of chains for which an evaluation lacks an image."""
        edited = EditedImages(self._images(done))
        return [chain.id for chain in self._chains.chains if not edited.complete(chain)]

    def keep(self, done: int, row: int, images: Sequence[Image.Image]) -> None:
        """Write the images of turns 1 to N, given [reference, turn 1, ..., turn N]."""
        EditedImages(self._images(done)).write(self._chains.chains[row], images[1:])

    def _file(self, done: int) -> Path:
        return self.folder / f"round-{done:06d}.json"

    def _images(self, done: int) -> Path:
        return self.folder / f"round-{done:06d}"


def _settings(made_by: MadeBy) -> dict[str, object]:
    """Return the settings that made images, by option; None: not recorded."""
    policy = made_by.lora and made_by.lora.partition(" ")[0]
    return {
        "evaluation.policy": policy,
        **{option: getattr(made_by, name) for option, name in SETTINGS.items()},
    }


def _short(value: object) -> str:
    """Return a value as short text; a list of chains as their number and the first id."""
    if isinstance(value, list):
        return f"{len(value)} chains from {value[0][0]!r} on" if value else "no chains"
    return repr(value)


class Images(Mapping[int, list[Image.Image | None]]):
    """Images [reference, turn 1, ..., turn N] of held-out chains by row, loaded on access."""

    def __init__(self, folder: Path, chains: ChainDataset) -> None:
        self._edited, self._chains = EditedImages(folder), chains

    def __getitem__(self, row: int) -> list[Image.Image | None]:
        return [self._chains[row].image, *self._edited.load(self._chains.chains[row])]

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))

    def __len__(self) -> int:
        return len(self._chains)
