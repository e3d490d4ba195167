"""Evaluations of held-out chains in the folder of a run: a file each, and images."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from accelerate import Accelerator
from PIL import Image

from mteditflow.chains import ChainDataset, EditedImages
from mteditflow.evaluation import Evaluation, JudgedBy
from mteditflow.evaluation.provenance import agreed


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
        kept = (self._images(0).name, self._images(evaluation.round).name)
        for folder in self.folder.glob("round-*/"):
            if folder.name not in kept:
                shutil.rmtree(folder)

    def all(self) -> list[Evaluation]:
        """Every evaluation of the run so far, in the order of rounds."""
        return [Evaluation.read(path) for path in sorted(self.folder.glob("round-*.json"))]

    def complete(self, done: int) -> bool:
        """Whether there is an evaluation of a round, none of whose chains lost a score."""
        path = self._file(done)
        if not path.exists():
            return False
        return not Evaluation.read(path).lost

    def rewind(self, done: int) -> None:
        """Forget evaluations of rounds that will be done again; -1 forgets all."""
        for path in self.folder.glob("round-*.json"):
            if int(path.stem.removeprefix("round-")) > done:
                path.unlink()

    def judge(self, judged_by: JudgedBy) -> JudgedBy:
        """Return the judge of the run: that of its evaluations so far, else this one.

        A server that does not say who it is, as while it starts, may be the same.

        Raises:
            ValueError: an evaluation was judged by another, or it is not known by whom.
        """
        before = [evaluation.provenance.judged_by for evaluation in self.all()]
        for judge in before:
            if not judge.known:
                raise ValueError(f"expected {judged_by}, got an evaluation without provenance")
            agreed(judge, judged_by)
        return before[0] if before else judged_by

    def images(self, done: int) -> Images:
        """Images of an evaluation by row."""
        return Images(self._images(done), self._chains)

    def keep(self, done: int, row: int, images: Sequence[Image.Image]) -> None:
        """Write the images [reference, turn 1, ..., turn N] of a chain, without the first."""
        EditedImages(self._images(done)).write(self._chains.chains[row], images[1:])

    def _file(self, done: int) -> Path:
        return self.folder / f"round-{done:06d}.json"

    def _images(self, done: int) -> Path:
        return self.folder / f"round-{done:06d}"


class Images(Mapping[int, list[Image.Image]]):
    """Images [reference, turn 1, ..., turn N] of held-out chains by row, read when asked for."""

    def __init__(self, folder: Path, chains: ChainDataset) -> None:
        self._edited, self._chains = EditedImages(folder), chains

    def __getitem__(self, row: int) -> list[Image.Image]:
        return [self._chains[row].image, *self._edited.load(self._chains.chains[row])]

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))

    def __len__(self) -> int:
        return len(self._chains)
