"""``score.mode=adaptive``: every query's highest scores are settled by a race over draws, image by image.

All images get a few draws of the bank; those whose score can no longer be among the ``score.top_k`` highest are dropped
(``racing.py``), the others get twice as many, until the survivors have the whole bank. What was dropped is checked on a
sample that gets the whole bank as well; where it shows that too much is lost, all images get it.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mucs_cli import processes
from mucs_cli.artifacts import fingerprint, read_kept, read_tensors, write_tensors
from mucs_cli.attribution.racing import margins, race_rounds
from mucs_cli.attribution.reducers import PER_DRAW
from mucs_cli.attribution.skew import mean_over_draws
from mucs_cli.block_file import BlockFile
from mucs_cli.rehearsal import current_rehearsal
from mucs_cli.rng import generator
from mucs_cli.runtime import LONG_REHEARSAL, Progress, log
from mucs_cli.stage_folder import Stage
from mucs_cli.stages.growing_losses import GrowingLosses
from mucs_cli.stages.loading import num_settled
from mucs_cli.stages.loss_comparison import LossComparison
from mucs_cli.stages.query_records import QueryRecords
from mucs_cli.stages.work import Work
from mucs_cli.tensor_forms import require_forms

RACES = "races"
"""The folder below a variant's that holds finished races and begun ones until the last is done."""
AUDIT = 16
"""Dropped images of which a batch gets the whole bank, to check what was dropped."""
UNIT_BATCHES = 16
"""Batches that are computed between two entries in the journal, at most."""
PART = 1 << 16
"""Images whose values are in memory at once."""
STEP = 1 << 32
"""Journal entries of one round, at most."""

Rows = NDArray[np.int64]
Row = Mapping[str, NDArray[Any]]
"""Of a query: ``score``, and ``draws`` where scores rest on several numbers of them; [N] each."""
ROW_FORMS = {"score": "float32 N", "draws": "int32 N"}


class Races:
    """The races of a score command.

    Args:
        work: what to score.
        comparison: the method's scorer, whose models are compared.
        stage: whose folder holds what is finished of an interrupted attempt, below ``RACES``.
    Raises:
        UserError: ``score.top_k`` is more than there are images.
    """

    def __init__(self, work: Work, comparison: LossComparison, stage: Stage):
        self.work, self.comparison, self.stage = work, comparison, stage
        self.k = num_settled(work.config.score.top_k, work.num_images)
        self.confidence: float = work.config.score.confidence
        self.records = QueryRecords(stage.folder / RACES, lambda record: type(record.get("evaluations")) is int)

    def prepare(self) -> None:
        self.comparison.prepare_engines()
        self.engine = self.comparison.engines[0]
        bank_print = self.comparison.inputs["noise_bank"]
        self.base = processes.first_then_all(lambda: GrowingLosses(self.work, self.engine, bank_print))

    def write(self, path: Path, queries: Sequence[int], finished: Mapping[int, Row]) -> dict[str, Any]:
        """Writes the score file: ``score``, ``draws``, ``query_id`` and ``example_id``.

        Several processes share the queries out.

        Args:
            path: the file.
            queries: to race.
            finished: rows of other queries that are there already.
        Returns:
            What the manifest is to record.
        """
        self.race(queries)
        return processes.on_first(lambda: self._write(path, queries, finished))

    def _write(self, path: Path, queries: Sequence[int], finished: Mapping[int, Row]) -> dict[str, Any]:
        ids, num_images = sorted({*queries, *finished}), self.work.num_images
        tensors = {
            "score": ("float32", (len(ids), num_images)),
            "draws": ("int32", (len(ids), num_images)),
            "query_id": ("int64", (len(ids),)),
            "example_id": ("int64", (num_images,)),
        }
        file = BlockFile(path, tensors, fingerprint(self.stage.identity, ids))
        file.arrays["query_id"][:] = ids
        file.arrays["example_id"][:] = self.work.inputs.data.training
        for place, query in enumerate(ids):  # one after the other: all of them may be more than the memory holds
            for name, values in (finished[query] if query in finished else self.row(query)).items():
                file.arrays[name][place] = values
        file.finish()  # an interruption before its manifest: it is written again from the races' results
        facts = self.records.read()
        return {"top_k": self.k, "races": {str(query): facts[query] for query in queries if query in facts}}

    def race(self, queries: Sequence[int]) -> None:
        """Races those that no interrupted attempt has."""
        raced = self.records.read()
        left = processes.on_first(lambda: [query for query in queries if not (query in raced and self.result(query))])
        self.evaluations = [raced[query]["evaluations"] for query in queries if query not in left]
        with Progress("score", len(queries), "queries", len(queries) - len(left), LONG_REHEARSAL) as progress:
            for query, facts in processes.share_out(left, lambda query: [self._run(query, progress)]):
                self.evaluations.append(facts["evaluations"])
                progress.advance(numbers={"query": query, "evaluations": facts["evaluations"]})
                log.info("score: query %d, %s", query, describe(facts))

    def result(self, query: int) -> dict[str, Tensor]:
        """``score`` [N], float32, and ``draws`` [N], int32: how many each score rests on; empty before it is raced."""
        return read_kept(self._path(query), ROW_FORMS, N=self.work.num_images)

    def row(self, query: int) -> Row:
        """What a finished race says of a query."""
        if current_rehearsal() is not None:  # leaves the loop early, and needs no scores
            nothing = np.zeros(self.work.num_images, np.float32)
            return {"score": nothing, "draws": nothing.astype(np.int32)}
        tensors = read_tensors(self._path(query))
        require_forms(self._path(query), tensors, ROW_FORMS, "score", N=self.work.num_images)
        return {name: tensors[name].numpy() for name in ROW_FORMS}

    def typical_evaluations(self) -> float:
        """Of a race: the mean of those that are finished, or a guess, which the digits and photographs come up to."""
        first_round = self.work.num_images * race_rounds(len(self.engine.bank))[0]
        return fmean(self.evaluations) if self.evaluations else 2.2 * first_round

    def _path(self, query: int) -> Path:
        return self.stage.folder / RACES / f"query_{query:04d}.safetensors"

    def _run(self, query: int, progress: Progress) -> dict[str, Any]:
        tensors = self.comparison.unlearned.tensors(query, self.work.inputs.device)
        while True:
            path = self._path(query).with_suffix(".losses")
            identity = fingerprint(self.stage.identity, query, self.engine.block_size)
            shape = (self.work.num_images, len(self.engine.bank))
            race = Race(self, query, tensors, BlockFile(path, {"loss": ("float32", shape)}, identity), progress)
            try:
                race.run()
            except RuntimeError as error:
                self.engine.shrink(error)
                continue
            write_tensors(self._path(query), {"score": race.scores(), "draws": torch.from_numpy(race.draws)})
            self.records.write(query, race.facts())
            race.file.discard()
            return race.facts()


class Race:
    """One query's.

    Args:
        races: its surroundings.
        query: the query.
        tensors: those in which its unlearned model differs from the base model.
        file: takes that model's losses.
        progress: is told how far it is.
    Attributes:
        draws: int32 [N]; how many draws of the bank, the first ones, each image has.
    """

    def __init__(self, races: Races, query: int, tensors: Mapping[str, Tensor], file: BlockFile, progress: Progress):
        self.races, self.query, self.tensors, self.file, self.progress = races, query, tensors, file, progress
        self.num_images, self.num_draws = races.work.num_images, len(races.engine.bank)
        self.loss = file.arrays["loss"]
        self.draws = np.zeros(self.num_images, np.int32)
        self.alive: list[int] = []
        self.audited = np.zeros(0, np.int64)
        self.recall = 1.0
        self.evaluations = self.computed = 0
        self._step = 0

    def run(self) -> None:
        everything = np.arange(self.num_images)
        alive, margin = everything, np.full(self.num_images, np.inf)
        for num_draws in race_rounds(self.num_draws):
            self.alive.append(len(alive))
            self.extend(alive, num_draws)
            if num_draws < self.num_draws and len(alive) > self.races.k:
                values = self.values(alive, num_draws)
                margin[alive] = margins(values, self.num_draws, self.races.k, self.races.confidence)
                alive = alive[margin[alive] >= 0]
        dropped = everything[margin < 0]
        self.audit(dropped[np.argsort(-margin[dropped], kind="stable")])
        if self.recall < self.races.confidence:
            log.warning(
                "query %d: about %.3f of its %d highest scores are found; going on with the whole bank for every image",
                self.query,
                self.recall,
                self.races.k,
            )
            self.extend(everything, self.num_draws)

    def audit(self, dropped: Rows) -> None:
        """Gives some of the dropped images the whole bank.

        Those that came closest, a batch at a time until a batch holds none of the highest, and a random sample of the
        rest, which says how many of the highest are lost there.

        Args:
            dropped: the closest first.
        """
        position = 0
        while position < len(dropped):
            batch = dropped[position : position + AUDIT]
            position += len(batch)
            if not self._highest_among(batch):
                break
        rest = dropped[position:]
        order = torch.randperm(
            len(rest), generator=generator(self.races.comparison.noise_bank.seed, "audit", self.query)
        )
        sample = rest[order[:AUDIT].numpy()]
        if len(sample):
            lost = self._highest_among(sample) * (len(rest) / len(sample) - 1)  # those found are lost no more
            self.recall = max(0.0, 1 - lost / self.races.k)

    def _highest_among(self, rows: Rows) -> int:
        """How many of some dropped images are among the k highest once they have the whole bank."""
        self.extend(rows, self.num_draws)
        self.audited = np.concatenate([self.audited, rows])
        complete, score = self.complete()
        return int(np.isin(complete[np.argsort(-score, kind="stable")[: self.races.k]], rows).sum())

    def extend(self, rows: Rows, num_draws: int) -> None:
        """Brings images to the bank's first ``num_draws`` draws; what an interrupted attempt has computed is used."""
        rows = rows[self.draws[rows] < num_draws]
        if not len(rows):
            return
        first = int(self.draws[rows].min())
        some = max(1, UNIT_BATCHES * self.races.engine.block_size // (num_draws - first))
        for unit, start in enumerate(range(0, len(rows), some)):
            part = rows[start : start + some]
            counts = num_draws - self.draws[part]
            row = np.repeat(part, counts)
            draw = num_draws - np.concatenate([np.arange(count, 0, -1) for count in counts])
            self.races.base.require(row, draw)
            number = self._step * STEP + unit
            if not self.file.holds(number, self.loss[row, draw]):
                loss = self.races.engine.pair_losses(row, draw, self.tensors).numpy()
                if not np.isfinite(loss).all():
                    self.races.comparison.refuse_query(self.query)
                self.loss[row, draw] = loss
                self.file.commit(number, loss)
                self.computed += len(row)
            self.evaluations += len(row)
            self.progress.advance(
                0,
                {"query": self.query, "draw": num_draws, "images": len(rows)},
                min(1.0, self.computed / self.races.typical_evaluations()),
            )
        self.draws[rows] = num_draws
        self._step += 1

    def values(self, rows: Rows, num_draws: int) -> NDArray[np.float64]:
        """Of images that have them, the values whose mean is the score; [len(rows), num_draws]."""
        both = (self.races.base.loss, self.loss)
        base, loss = (torch.from_numpy(np.array(losses[rows, :num_draws])) for losses in both)
        comparison = self.races.comparison
        found: NDArray[np.float64] = PER_DRAW[comparison.reducer](base, loss, comparison.epsilon).numpy()
        return found

    def complete(self) -> tuple[Rows, NDArray[np.float32]]:
        """The images that have the whole bank, and their scores."""
        rows, score = np.flatnonzero(self.draws == self.num_draws), []
        for some in in_parts(rows):
            score.append(mean_over_draws(torch.from_numpy(self.values(some, self.num_draws))).float().numpy())
        return rows, np.concatenate(score)

    def scores(self) -> Tensor:
        """[N], float32: of images with the whole bank as exact mode's; of the others estimates, below the k-th place.

        An estimate is the mean over the draws that the image has, plus how far such a mean falls short of the score in
        the audited images, on average.
        """
        score = np.empty(self.num_images, np.float32)
        rows, whole = self.complete()
        score[rows] = whole
        audited = self.values(self.audited, self.num_draws)
        for num_draws in np.unique(self.draws[self.draws < self.num_draws]):
            some = np.flatnonzero(self.draws == num_draws)
            shift = audited.mean() - audited[:, :num_draws].mean()
            for part in in_parts(some):
                score[part] = self.values(part, int(num_draws)).mean(axis=1) + shift
        place = np.partition(whole, -self.races.k)[-self.races.k]
        unsettled = self.draws < self.num_draws
        score[unsettled] = np.minimum(score[unsettled], np.nextafter(place, np.float32(-np.inf)))
        return torch.from_numpy(score)

    def facts(self) -> dict[str, Any]:
        """What the manifest is to record of the query."""
        return {
            "alive": self.alive,
            "num_audited": len(self.audited),
            "estimated_recall": round(self.recall, 4),
            "is_exact": bool((self.draws == self.num_draws).all()),
            "evaluations": self.evaluations,
        }


def in_parts(rows: Rows) -> Iterator[Rows]:
    """Rows as many at a time as have values of a size that does not matter; at least one part."""
    for start in range(0, max(len(rows), 1), PART):
        yield rows[start : start + PART]


def describe(facts: Mapping[str, Any]) -> str:
    if facts["is_exact"]:
        return "every image has the whole bank"
    alive = ", ".join(f"{count:,}" for count in facts["alive"])
    return f"images in the race {alive}; {facts['num_audited']} dropped ones audited"
