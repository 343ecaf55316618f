"""``mucs score``: losses of the base and the unlearned models over all training images, and the scores."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mucs_cli.artifacts import Stage, as_tensor, fingerprint, read_tensors, write_text
from mucs_cli.attribution.scoring import Block
from mucs_cli.attribution.skew import mean_skew
from mucs_cli.config import VARIANT_SECTIONS
from mucs_cli.data.images import ImageDataset
from mucs_cli.errors import UserError
from mucs_cli.runtime import Progress, log, log_file
from mucs_cli.stages import unlearn
from mucs_cli.stages.blocks import Arrays, BlockWork, fill_file
from mucs_cli.stages.context import Context
from mucs_cli.stages.engine import Engine, base_losses, prepare_bank
from mucs_cli.stages.loading import load_inputs, load_queries
from mucs_cli.stages.unlearned import UnlearnedModels

TOP_ROWS = 100
"""Rows a query in top.csv; the whole ranking is in scores.safetensors."""


def run(context: Context) -> None:
    """Writes ``noise_bank/``, ``score/_base/<fingerprint>/`` and ``score/<variant>/``."""
    config = context.config
    inputs = load_inputs(context)
    queries = load_queries(context, inputs.model)
    unlearned = UnlearnedModels(context.folder("unlearn", context.variant(*unlearn.SECTIONS)))
    unlearned.check(inputs.model.fingerprint, queries.wanted)
    bank, bank_print = prepare_bank(context, config.noise_bank, inputs)
    folder = context.folder("score", context.variant(*VARIANT_SECTIONS))
    prints = {
        "dataset": inputs.data.fingerprint,
        "model": inputs.model.fingerprint,
        "noise_bank": bank_print,
        "unlearned_models": unlearned.fingerprints(queries.selected),
    }
    stage = context.stage(folder, "score", sections=VARIANT_SECTIONS, inputs=prints, queries=queries.wanted)
    if stage.is_done():
        log.info("score: up to date (%s)", folder)
        return
    stage.begin()
    with log_file(folder / "log.txt"):
        engine = Engine(context, inputs, bank)
        base = base_losses(context, engine, inputs.model.fingerprint, bank_print)
        work = Scores(engine, base, unlearned, queries.selected, finished_scores(stage))
        fill_file(folder / "scores.safetensors", fingerprint(stage.identity, work.query_ids), work)
        write_top(folder / "top.csv", read_tensors(folder / "scores.safetensors"), inputs.pixels)
        stage.finish(
            {
                "device": str(inputs.device),
                "seeds": {"noise_bank": config.noise_bank.seed},
                "unlearn_variant": unlearned.folder.name,
                "block_size": engine.block_size,
                "threads": torch.get_num_threads(),
                "evaluations_per_second": engine.throughput(),
                "counts": {
                    "queries": len(work.query_ids),
                    "training_images": len(inputs.data.training),
                    "draws": len(bank),
                },
            },
            [folder / "scores.safetensors", folder / "top.csv"],
        )
        log.info("score: %d queries x %d training images in %s", len(work.new), engine.num_images, folder)


def finished_scores(stage: Stage) -> dict[int, Tensor]:
    """query -> its scores [N], of a finished stage that lacks some queries; empty without one."""
    if not stage.previous:
        return {}
    name = "scores.safetensors"
    tensors = read_tensors(stage.folder / name, stage.previous["outputs"][name]["sha256"])
    return dict(zip(tensors["query_id"].tolist(), tensors["score"], strict=True))


class Scores(BlockWork):
    """``scores.safetensors``: finished rows as they are, the others in passes of as many models as memory holds.

    Args:
        engine: computes the unlearned models' losses.
        base: the base model's, [N, n].
        unlearned: the unlearned models.
        queries: ids that are wanted.
        finished: scores that are there already.
    """

    title = "score"

    def __init__(
        self,
        engine: Engine,
        base: np.ndarray,
        unlearned: UnlearnedModels,
        queries: Sequence[int],
        finished: Mapping[int, Tensor],
    ):
        self.engine, self.base, self.unlearned, self.finished = engine, base, unlearned, finished
        self.new = [query for query in queries if query not in finished]
        self.query_ids = sorted({*queries, *finished})
        self.row = {query: row for row, query in enumerate(self.query_ids)}
        size = unlearned.per_pass(self.new, engine.context.config.score.memory_budget)
        self.passes = [self.new[start : start + size] for start in range(0, len(self.new), size)]
        self.tensors = {
            "score": ("float32", (len(self.query_ids), engine.num_images)),
            "query_id": ("int64", (len(self.query_ids),)),
            "example_id": ("int64", (engine.num_images,)),
        }

    def blocks(self) -> list[Block]:
        return self.engine.blocks()

    def cost(self, block: Block, part: Sequence[int]) -> int:
        return len(block) * len(part) * len(self.engine.bank)

    def begin(self, arrays: Arrays) -> None:
        arrays["query_id"][:] = self.query_ids
        arrays["example_id"][:] = self.engine.data.training
        for query, score in self.finished.items():
            arrays["score"][self.row[query]] = score.numpy()

    def load(self, part: Sequence[int]) -> Any:
        return [self.unlearned.tensors(query, self.engine.device) for query in part]

    def fill(self, arrays: Arrays, block: Block, part: Sequence[int], loaded: Any, progress: Progress) -> None:
        base = as_tensor(self.base[block.start : block.stop])
        losses = self.engine.losses(block, loaded, progress)
        epsilon = self.engine.context.config.method.epsilon
        for query, loss in zip(part, losses, strict=True):
            score = mean_skew(base, loss, epsilon)
            if not score.isfinite().all():
                raise UserError(
                    f"query {query}",
                    "got scores that are not finite: its unlearned model has diverged. "
                    "Lower unlearning.learning_rate and rerun mucs unlearn.",
                )
            arrays["score"][self.row[query], block.start : block.stop] = score.float().numpy()

    def shrink(self, error: RuntimeError) -> None:
        self.engine.shrink(error)


def write_top(path: Path, scores: Mapping[str, Tensor], data: ImageDataset) -> None:
    """``query,rank,example_id,file,score`` and the metadata columns, for the highest scores; ties by example_id."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["query", "rank", "example_id", "file", "score", *data.metadata])
    for query, row in zip(scores["query_id"].tolist(), scores["score"].numpy(), strict=True):
        for rank, position in enumerate(np.argsort(-row, kind="stable")[:TOP_ROWS], start=1):
            example = int(data.training[position])
            metadata = [column[example] for column in data.metadata.values()]
            rows.writerow([query, rank, example, data.file[example], f"{row[position]:.9g}", *metadata])
    write_text(path, text.getvalue())
