"""``mucs score``: losses of the base and the unlearned models over all training images, and the scores."""

import csv
import io
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mucs_cli.artifacts import (
    BlockFile,
    Stage,
    as_tensor,
    fingerprint,
    map_tensor,
    read_tensors,
    require_manifest,
    sha256_file,
    write_tensors,
    write_text,
)
from mucs_cli.attribution.scoring import GRANULE, Block, bank_losses, blocks_of, choose_block_size
from mucs_cli.attribution.skew import mean_skew
from mucs_cli.config import VARIANT_SECTIONS, NoiseBankConfig
from mucs_cli.data.dataset import ImageDataset
from mucs_cli.diffusion.denoiser import Denoiser
from mucs_cli.diffusion.noise_bank import NoiseBank, draw_noise_bank
from mucs_cli.errors import UserError
from mucs_cli.runtime import Progress, log, log_file, smaller_batch
from mucs_cli.stages import unlearn
from mucs_cli.stages.context import Context
from mucs_cli.stages.loading import (
    Queries,
    load_base_model,
    load_data,
    load_queries,
    machine_facts,
    prepare_device,
    save_machine_facts,
)

Arrays = dict[str, np.memmap]
TOP_ROWS = 100
"""Rows a query in top.csv; the whole ranking is in scores.safetensors."""


def run(context: Context) -> None:
    """Writes ``noise_bank/``, ``score/_base/<fingerprint>/`` and ``score/<variant>/``."""
    config = context.config
    device = prepare_device(context)
    data = load_data(context)
    model = load_base_model(context, data, device)
    queries = load_queries(context, model)
    unlearned = UnlearnedModels(context.folder("unlearn", context.variant(*unlearn.SECTIONS)))
    unlearned.check(model.fingerprint, queries.fingerprint)
    bank, bank_print = prepare_bank(context.folder("noise_bank"), config.noise_bank, data, model.denoiser)
    folder = context.folder("score", context.variant(*VARIANT_SECTIONS))
    inputs = {
        "dataset": data.fingerprint,
        "model": model.fingerprint,
        "queries": queries.fingerprint,
        "noise_bank": bank_print,
        "unlearned_models": unlearned.fingerprint,
    }
    stage = context.stage(folder, "score", sections=VARIANT_SECTIONS, inputs=inputs)
    if stage.is_done():
        log.info("score: up to date (%s)", folder)
        return
    stage.begin()
    with log_file(folder / "log.txt"):
        engine = Engine(context, model.denoiser, data, bank, device)
        base = base_losses(context, engine, model.fingerprint, bank_print)
        score_queries(engine, folder, base, unlearned, queries, fingerprint(inputs, stage.identity))
        scores = map_tensor(folder / "scores.safetensors", "score")
        write_top(folder / "top.csv", scores, data)
        stage.finish(
            {
                "device": str(device),
                "seeds": {"noise_bank": config.noise_bank.seed},
                "unlearn_variant": unlearned.folder.name,
                "block_size": engine.block_size,
                "threads": torch.get_num_threads(),
                "evaluations_per_second": engine.throughput(),
                "counts": {"queries": len(queries), "training_images": len(data.training), "draws": len(bank)},
            },
            [folder / "scores.safetensors", folder / "top.csv"],
        )
        log.info("score: %d queries x %d training images in %s", len(queries), len(data.training), folder)


class UnlearnedModels:
    """The unlearned models of one variant, on disk."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest = require_manifest(folder, "unlearn")
        self.fingerprint = fingerprint(
            {name: entry["sha256"] for name, entry in self.manifest["outputs"].items() if name.endswith(".safetensors")}
        )

    def check(self, model: str, queries: str) -> None:
        """Raises UserError where they were made from another base model or other queries than the run now has."""
        for name, value in (("model", model), ("queries", queries)):
            recorded = self.manifest["inputs"][name]
            if recorded != value:
                raise UserError(
                    str(self.folder / "manifest.json"),
                    f"got unlearned models of {name} {recorded[:16]}; the run now has {value[:16]}. "
                    "Rerun mucs unlearn with overwrite=true.",
                )

    def tensors(self, query: int, device: torch.device) -> dict[str, Tensor]:
        """The tensors in which a query's unlearned model differs from the base model."""
        path = unlearn.query_file(self.folder, query)
        loaded = read_tensors(path, self.manifest["outputs"][path.name]["sha256"])
        return {name: tensor.to(device) for name, tensor in loaded.items()}

    def bytes_of(self, query: int) -> int:
        return int(self.manifest["outputs"][unlearn.query_file(self.folder, query).name]["bytes"])


class Engine:
    """Losses of any models over all training images under one bank, in blocks of one size."""

    def __init__(self, context: Context, denoiser: Denoiser, data: ImageDataset, bank: NoiseBank, device: torch.device):
        self.context = context
        self.denoiser = denoiser
        self.data = data
        self.bank = bank.to(device)
        self.device = device
        self.conditional = denoiser.network.is_conditional
        self.block_size = self._block_size()
        self.evaluations = 0
        self.seconds = 0.0

    @property
    def num_images(self) -> int:
        return len(self.data.training)

    def blocks(self) -> list[Block]:
        return blocks_of(self.num_images, self.block_size)

    def load(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images and their own conditions, on the device."""
        ids = self.data.training[rows.numpy()]
        conditions = self.data.conditions(ids) if self.conditional else None
        return self.data.images(ids).to(self.device), None if conditions is None else conditions.to(self.device)

    def losses(self, block: Block, models: Sequence[Mapping[str, Tensor]], progress: Progress) -> Tensor:
        """[M, len(block), n]."""
        image, condition = self.load(block.rows())
        started = time.perf_counter()
        losses = bank_losses(self.denoiser, image, condition, self.bank, models, lambda _: progress.advance(len(block)))
        self.seconds += time.perf_counter() - started
        self.evaluations += len(models) * len(block) * len(self.bank)
        return losses[:, : len(block)]

    def shrink(self, error: RuntimeError) -> None:
        """A smaller block after running out of memory; any other error is raised again."""
        self.block_size = smaller_batch(error, self.block_size, "score.batch_size", GRANULE)
        self._remember_block_size()

    def throughput(self) -> float | None:
        """Evaluations (an image under a draw, through one model) a second; None where nothing was computed."""
        return round(self.evaluations / self.seconds, 1) if self.seconds else None

    def _block_size(self) -> int:
        """From the config, else from the run's earlier measurement, else measured now and stored in the run."""
        given = self.context.config.score.batch_size
        if given is not None:
            return given
        known = machine_facts(self.context.run).get("score_block_size", {}).get(self._key())
        if known is not None:
            return int(known)
        rows = torch.arange(min(self.num_images, 256))
        image, condition = self.load(rows)
        self.block_size = choose_block_size(self.denoiser, image, condition, self.bank, self.num_images)
        log.info("score: %d images a forward pass (measured; kept in machine.json)", self.block_size)
        self._remember_block_size()
        return self.block_size

    def _key(self) -> str:
        return f"{self.device.type}/{self.num_images}"

    def _remember_block_size(self) -> None:
        facts = machine_facts(self.context.run)
        sizes = {**facts.get("score_block_size", {}), self._key(): self.block_size}
        save_machine_facts(self.context.run, {**facts, "score_block_size": sizes})


def prepare_bank(
    folder: Path, config: NoiseBankConfig, data: ImageDataset, denoiser: Denoiser
) -> tuple[NoiseBank, str]:
    """Draws the bank, at noise levels the model can take, and stores it under its fingerprint unless it is there."""
    bank = draw_noise_bank(
        config.num_draws,
        (data.channels, data.height, data.width),
        grid=config.grid,
        sigma_min=config.sigma_min,
        sigma_max=config.sigma_max,
        rho=config.rho,
        seed=config.seed,
        nearest_sigma=denoiser.nearest_sigma,
    )
    bank_print = fingerprint(bank.sigma, bank.noise)
    path = folder / f"{bank_print[:16]}.safetensors"
    if not path.exists():
        write_tensors(path, {"sigma": bank.sigma, "noise": bank.noise})
    return bank, bank_print


def base_losses(context: Context, engine: Engine, model_print: str, bank_print: str) -> np.ndarray:
    """The base model's losses [N, n] under the bank: from the run's cache, or computed into it."""
    inputs = {"dataset": engine.data.fingerprint, "model": model_print, "noise_bank": bank_print}
    folder = context.folder("score", "_base", fingerprint(inputs)[:16])
    stage = Stage(folder, "score", {"config": {}, "inputs": inputs})
    path = folder / "losses.safetensors"
    if stage.is_done() and path.exists():
        recorded = require_manifest(folder, "score")["outputs"][path.name]["sha256"]
        if sha256_file(path) == recorded:
            return map_tensor(path, "loss")
        log.warning("%s is damaged; computing it again", path)
    stage.begin()
    shape = (engine.num_images, len(engine.bank))

    def store(arrays: Arrays, block: Block, queries: range, losses: Tensor) -> None:
        finite = losses[0].isfinite().all(dim=1)
        if not finite.all():
            example = int(engine.data.training[block.start + int((~finite).nonzero()[0])])
            raise UserError(
                f"example {example} ({engine.data.file[example]})",
                "got a base-model loss that is not finite. Check the image, or train the model longer.",
            )
        arrays["loss"][block.start : block.stop] = losses[0].numpy()

    tensors = {"loss": ("float32", shape)}
    fill_blocks(
        engine, path, tensors, fingerprint(inputs), "score: base model", [range(1)], lambda queries: [{}], store
    )
    stage.finish({"counts": {"training_images": shape[0], "draws": shape[1]}, "block_size": engine.block_size}, [path])
    return map_tensor(path, "loss")


def score_queries(
    engine: Engine, folder: Path, base: np.ndarray, unlearned: UnlearnedModels, queries: Queries, identity: str
) -> None:
    """Fills ``scores.safetensors`` in passes over the data, each with as many models as the memory budget holds."""
    num_queries, num_images = len(queries), engine.num_images
    epsilon = engine.context.config.method.epsilon
    per_pass = queries_per_pass(unlearned, num_queries, engine.context.config.score.memory_budget)
    passes = [range(first, min(first + per_pass, num_queries)) for first in range(0, num_queries, per_pass)]

    def store(arrays: Arrays, block: Block, queries: range, losses: Tensor) -> None:
        base_block = as_tensor(base[block.start : block.stop])
        for query, loss in zip(queries, losses, strict=True):
            score = mean_skew(base_block, loss, epsilon)
            if not score.isfinite().all():
                raise UserError(
                    f"query {query}",
                    "got scores that are not finite: its unlearned model has diverged. "
                    "Lower unlearning.learning_rate and rerun mucs unlearn.",
                )
            arrays["score"][query, block.start : block.stop] = score.float().numpy()
        arrays["query_id"][:] = np.arange(num_queries)
        arrays["example_id"][:] = engine.data.training

    tensors: dict[str, tuple[str, tuple[int, ...]]] = {
        "score": ("float32", (num_queries, num_images)),
        "query_id": ("int64", (num_queries,)),
        "example_id": ("int64", (num_images,)),
    }

    def load(queries: range) -> list[dict[str, Tensor]]:
        return [unlearned.tensors(query, engine.device) for query in queries]

    fill_blocks(engine, folder / "scores.safetensors", tensors, identity, "score", passes, load, store)


def queries_per_pass(unlearned: UnlearnedModels, num_queries: int, budget: float) -> int:
    """How many unlearned models fit into ``budget`` GiB, at least one."""
    largest = max(unlearned.bytes_of(query) for query in range(num_queries))
    return max(1, min(num_queries, int(budget * 2**30 / largest)))


def fill_blocks(
    engine: Engine,
    path: Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    identity: str,
    title: str,
    passes: Sequence[range],
    load: Callable[[range], Sequence[Mapping[str, Tensor]]],
    store: Callable[[Arrays, Block, range, Tensor], None],
) -> None:
    """Computes every block of every pass that an interrupted attempt has not, and stores what came of it.

    Args:
        engine: computes the losses; its block becomes smaller after running out of memory, and the file starts again.
        path, tensors, identity: the file, see ``BlockFile``.
        title: for the progress line.
        passes: the models of each pass over the data, by number.
        load: the models of a pass.
        store: writes a block's losses [M, B, n] into the file's arrays.
    """
    while True:
        blocks = engine.blocks()
        file = BlockFile(path, tensors, f"{identity}/{engine.block_size}")
        todo = [[b for b in blocks if p * len(blocks) + b.index not in file.done] for p in range(len(passes))]
        cost = [sum(len(b) for b in blocks) * len(models) * len(engine.bank) for models in passes]
        left = sum(
            len(b) * len(models) * len(engine.bank) for part, models in zip(todo, passes, strict=True) for b in part
        )
        try:
            with Progress(title, sum(cost), "evaluations", sum(cost) - left) as progress:
                for p, models in enumerate(passes):
                    loaded = load(models) if todo[p] else []
                    for block in todo[p]:
                        store(file.arrays, block, models, engine.losses(block, loaded, progress))
                        file.commit(p * len(blocks) + block.index)
            file.finish()
            return
        except RuntimeError as error:
            engine.shrink(error)


def write_top(path: Path, scores: np.ndarray, data: ImageDataset) -> None:
    """``query,rank,example_id,file,score`` and the metadata columns, for the highest scores; ties by example_id."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["query", "rank", "example_id", "file", "score", *data.metadata])
    for query, row in enumerate(scores):
        for rank, position in enumerate(np.argsort(-row, kind="stable")[:TOP_ROWS], start=1):
            example = int(data.training[position])
            metadata = [column[example] for column in data.metadata.values()]
            rows.writerow([query, rank, example, data.file[example], f"{row[position]:.9g}", *metadata])
    write_text(path, text.getvalue())
