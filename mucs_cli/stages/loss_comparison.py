"""Scores of methods that unlearn: every training image's losses under the unlearned and the base model, reduced."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from mucs_cli.attribution.reducers import reduce
from mucs_cli.attribution.scoring import Block
from mucs_cli.block_file import as_tensor, map_tensor
from mucs_cli.errors import UserError
from mucs_cli.runtime import Progress
from mucs_cli.schemas import NoiseBankConfig
from mucs_cli.stages.engine import Engine, base_losses, prepare_bank, stored_losses
from mucs_cli.stages.scorer import Scorer
from mucs_cli.stages.unlearned import UnlearnedModels
from mucs_cli.stages.work import Work


class LossComparison(Scorer):
    """Base losses once a run, the unlearned models' in passes of as many as the memory budget holds.

    Args:
        work: what it works with.
        noise_bank: the bank's configuration.
        reducer, epsilon: see ``reduce``.
        flip: score an image by the larger of its own score and its mirror image's.
    Raises:
        UserError: a query has no unlearned model, or one of another base model; the device lacks ``score.precision``.
    """

    unit = "evaluations"
    is_long = True

    def __init__(self, work: Work, noise_bank: NoiseBankConfig, reducer: str, epsilon: float = 0.0, flip: bool = False):
        super().__init__(work)
        if work.config.score.precision == "tf32" and work.inputs.device.type != "cuda":
            raise UserError("score.precision", "got tf32 on a CPU; only CUDA devices have it. Use float32 or bfloat16.")
        self.reducer, self.epsilon = reducer, epsilon
        self.flips = (False, True) if flip else (False,)
        self.noise_bank = noise_bank
        network = work.inputs.model.denoiser.network
        self.unlearned = UnlearnedModels(work.context.folder("unlearn", work.context.unlearn_variant()), network)
        self.unlearned.check(work.inputs.model.fingerprint, work.queries.wanted)
        self.bank, bank_print = prepare_bank(work.context, noise_bank, work.inputs)
        self.inputs = {
            "noise_bank": bank_print,
            "unlearned_models": self.unlearned.fingerprints(work.queries.selected),
        }

    def prepare_engines(self) -> None:
        self.engines = [
            Engine(self.work.context, self.work.inputs, self.bank, self.noise_bank, flip) for flip in self.flips
        ]

    def prepare(self) -> None:
        self.prepare_engines()
        self.base = [base_losses(self.work, engine, self.inputs["noise_bank"]) for engine in self.engines]
        self.kept = {query: kept for query in self.work.queries.selected if (kept := self._kept_losses(query))}

    def _kept_losses(self, query: int) -> list[Path]:
        """Where the losses of a query's unlearned model are, an engine each, kept by any variant; empty without them.

        Not mapped: of many queries that would be more open files than a process may have.
        """
        device, keep = self.work.inputs.device, self.work.config.score.keep_losses
        found = [
            stored_losses(
                self.work,
                engine,
                self.inputs["noise_bank"],
                query,
                self.inputs["unlearned_models"][query],
                (lambda: self.unlearned.tensors(query, device)) if keep else None,
            )
            for engine in self.engines
        ]
        there = [Path(losses.filename) for losses in found if losses is not None and losses.filename is not None]
        return there if len(there) == len(found) else []

    def blocks(self) -> list[Block]:
        return self.engines[0].blocks()

    def passes(self, queries: Sequence[int]) -> list[Sequence[int]]:
        size = self.unlearned.per_pass(queries, self.work.config.score.memory_budget)
        return [queries[start : start + size] for start in range(0, len(queries), size)]

    def cost(self, block: Block, queries: Sequence[int]) -> int:
        new = [query for query in queries if query not in self.kept]
        return len(block) * len(new) * len(self.bank) * len(self.engines)

    def load(self, queries: Sequence[int]) -> dict[int, Mapping[str, Tensor]]:
        device = self.work.inputs.device
        return {query: self.unlearned.tensors(query, device) for query in queries if query not in self.kept}

    def scores(self, queries: Sequence[int], loaded: Any, block: Block, progress: Progress) -> Tensor:
        found, rows = [], slice(block.start, block.stop)
        for index, engine in enumerate(self.engines):
            base = as_tensor(self.base[index][rows])
            losses: dict[int, Tensor] = {}
            if loaded:
                losses |= zip(loaded, engine.losses(block, list(loaded.values()), progress, list(loaded)), strict=True)
            kept = (query for query in queries if query in self.kept)
            losses |= {query: as_tensor(map_tensor(self.kept[query][index], "loss")[rows]) for query in kept}
            found.append(torch.stack([reduce(self.reducer, base, losses[query], self.epsilon) for query in queries]))
        scores = torch.stack(found).amax(dim=0)
        finite = scores.isfinite().all(dim=1)
        if not finite.all():
            self.refuse_query(queries[int((~finite).nonzero()[0])])
        return scores

    def refuse_query(self, query: int) -> NoReturn:
        """Raises UserError: a query's losses or scores are not finite."""
        raise UserError(
            f"query {query}",
            "got scores that are not finite: its unlearned model has diverged. "
            "Lower the learning rate and rerun mucs unlearn.",
        )

    def shrink(self, error: RuntimeError) -> None:
        for engine in self.engines:
            engine.shrink(error)

    def facts(self) -> dict[str, Any]:
        return {
            "seeds": {"noise_bank": self.noise_bank.seed},
            "unlearn_variant": self.unlearned.folder.name,
            "block_size": self.engines[0].block_size,
            "threads": torch.get_num_threads(),
            "evaluations_per_second": self.engines[0].throughput(),
            "draws": len(self.bank),
        }
