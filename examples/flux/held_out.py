"""Held-out chains: edited again and again from the same noise, scored, kept in the run's folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import Accelerator
from PIL import Image

from mteditflow.chains import Chain, ChainDataset
from mteditflow.evaluation import Evaluation
from mteditflow.rewards import TurnScores
from mteditflow.training import gather_scores, keyed_generator

if TYPE_CHECKING:
    from .run import Run


class HeldOut:
    """Evaluations of a run: a file each, and the images of each turn of each chain.

    Ranks take equal parts of the chains in order; the last is filled up with copies, which do not
    count. The folder is one that all ranks see.
    """

    def __init__(self, chains: ChainDataset, folder: Path, accelerator: Accelerator) -> None:
        self._chains, self.folder, self._accelerator = chains, folder, accelerator

    def evaluate(self, run: Run) -> None:
        """Edit and score all chains with the policy as it is; a collective call."""
        ranks, rank = self._accelerator.num_processes, self._accelerator.process_index
        size = -(-len(self._chains) // ranks)
        rows = [min(row, len(self._chains) - 1) for row in range(rank * size, (rank + 1) * size)]
        evaluation, waiting, edited = run.config.evaluation, [], run.log.bar
        with (
            run.policies.use(evaluation.policy),
            edited("evaluation", size, unit="chains") as bar,
        ):
            for start in range(0, size, evaluation.batch):
                part = rows[start : start + evaluation.batch]
                chains, made = self._edit(run, part)
                waiting.append(run.submit(chains, made))
                for row, images in zip(part, made, strict=True):
                    self._keep(run.done, row, images)
                bar.advance(len(part))
                run.stop_if_asked()
        terms, _ = gather_scores(run.collect(waiting), device=run.device)
        if self._accelerator.is_main_process:
            self._write(run, {name: first(x, len(self._chains)) for name, x in terms.items()})
        self._accelerator.wait_for_everyone()

    def _edit(self, run: Run, rows: Sequence[int]) -> tuple[list[Chain], list[list[Image.Image]]]:
        """Edit some chains, each from its own noise: images [reference, turn 1, ..., turn N]."""
        examples = self._chains.__getitems__(rows)
        references = [example.image for example in examples]
        chains = [example.chain for example in examples]
        made = run.editor.edit(
            references,
            [chain.instructions for chain in chains],
            generators=[keyed_generator(run.config.training.seed, "held out", row) for row in rows],
            batch=len(rows),
            call={"num_inference_steps": run.config.evaluation.steps},
        )
        return chains, [[first, *rest] for first, rest in zip(references, made, strict=True)]

    def _write(self, run: Run, terms: Mapping[str, TurnScores]) -> None:
        """Write the scores; of images keep those of the first evaluation and of this one."""
        evaluation = Evaluation(
            round=run.done,
            chain_ids=[chain.id for chain in self._chains.chains],
            instructions=[chain.instructions for chain in self._chains.chains],
            terms=terms,
            success_at=run.config.rewards.success,
        )
        evaluation.write(self._file(run.done))
        for folder in self.folder.glob("round-*/"):
            if folder.name not in (self._images(0).name, self._images(run.done).name):
                shutil.rmtree(folder)
        self._accelerator.log(evaluation.numbers, step=run.done)
        run.log.message(f"round {run.done}, held out: {in_words(evaluation)}")

    def all(self) -> list[Evaluation]:
        """Every evaluation of the run so far, in the order of rounds."""
        return [Evaluation.read(path) for path in sorted(self.folder.glob("round-*.json"))]

    def complete(self, done: int) -> bool:
        """Whether there is an evaluation of a round, none of whose chains lost a score."""
        path = self._file(done)
        if not path.exists():
            return False
        evaluation = Evaluation.read(path)
        return evaluation.counted == len(evaluation)

    def rewind(self, done: int) -> None:
        """Forget evaluations of rounds that will be done again; -1 forgets all."""
        for path in self.folder.glob("round-*.json"):
            if int(path.stem.removeprefix("round-")) > done:
                path.unlink()

    def images(self, done: int) -> Images:
        """Images of an evaluation by row."""
        return Images(self._images(done), self._chains)

    def _keep(self, done: int, row: int, images: Sequence[Image.Image]) -> None:
        folder = self._images(done)
        folder.mkdir(parents=True, exist_ok=True)
        for turn, image in enumerate(images[1:], start=1):
            image.save(folder / f"{row:06d}_turn_{turn}.png")

    def _file(self, done: int) -> Path:
        return self.folder / f"round-{done:06d}.json"

    def _images(self, done: int) -> Path:
        return self.folder / f"round-{done:06d}"


class Images(Mapping[int, list[Image.Image]]):
    """Images [reference, turn 1, ..., turn N] of held-out chains by row, read when asked for."""

    def __init__(self, folder: Path, chains: ChainDataset) -> None:
        self._folder, self._chains = folder, chains

    def __getitem__(self, row: int) -> list[Image.Image]:
        turns = range(1, self._chains.chains[row].turns + 1)
        paths = [self._folder / f"{row:06d}_turn_{turn}.png" for turn in turns]
        return [self._chains[row].image, *(Image.open(path).convert("RGB") for path in paths)]

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))

    def __len__(self) -> int:
        return len(self._chains)


def first(scores: TurnScores, count: int) -> TurnScores:
    """Scores of the first trajectories."""
    lost = {(b, n): reason for (b, n), reason in scores.lost.items() if b < count}
    return TurnScores(scores.score[:count], scores.turn_mask[:count], lost)


def in_words(evaluation: Evaluation) -> str:
    """What the last turn came to, in a line."""
    found = (f"{name} {value[-1]:.3g}" for name, value in evaluation.estimates.items())
    return f"at turn {evaluation.turns}: {', '.join(found)}"
