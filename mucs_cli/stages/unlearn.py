"""``mucs unlearn``: fine-tunes one model a query that has unlearned it, and saves the tensors that changed."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from mucs_cli.artifacts import write_tensors, write_text
from mucs_cli.attribution.null_loss import BATCH_SIZE, MAX_BATCHES, monte_carlo_null_loss
from mucs_cli.attribution.unlearning import (
    NonFiniteLossError,
    UnlearningResult,
    UnlearningSettings,
    trainable_names,
    unlearn,
)
from mucs_cli.config import UnlearningConfig, number_or_word
from mucs_cli.data.images import ImageDataset
from mucs_cli.errors import UserError
from mucs_cli.rng import ShuffledOrder
from mucs_cli.runtime import Progress, log, log_file
from mucs_cli.stages.context import Context
from mucs_cli.stages.loading import BaseModel, load_inputs, load_queries
from mucs_cli.stages.unlearned import query_file

SECTIONS = ("unlearning",)


def run(context: Context) -> None:
    """Writes ``unlearn/<variant>/``: ``query_<i>.safetensors``, ``log.jsonl`` and the manifest."""
    config = context.config.unlearning
    inputs = load_inputs(context)
    model, data, device = inputs.model, inputs.data, inputs.device
    queries = load_queries(context, model)
    folder = context.folder("unlearn", context.variant(*SECTIONS))
    stage = context.stage(
        folder,
        "unlearn",
        sections=SECTIONS,
        inputs={"dataset": data.fingerprint, "model": model.fingerprint},
        queries=queries.wanted,
    )
    if stage.is_done():
        log.info("unlearn: up to date (%s)", folder)
        return
    trainable = choose_trainable(model, config)
    stage.begin()
    with log_file(folder / "log.txt"):
        bound, source = choose_null_loss(model, data, config, device)
        log.info("unlearn: bound (null loss) %.4f, %s; %d trainable tensors", bound, source, len(trainable))
        log.debug("trainable: %s", ", ".join(trainable))
        settings = UnlearningSettings(
            null_loss=bound,
            learning_rate=config.learning_rate or model.learning_rate / 10,
            forget_weight=config.forget_weight,
            weight_decay=config.weight_decay,
            forget_batch_size=config.forget_batch_size,
            tolerance=config.tolerance,
            max_steps=config.max_steps,
            num_steps=config.num_steps,
            micro_batch_size=config.micro_batch_size,
        )
        results = {record["query"]: record for record in stage.previous.get("results", [])}
        results |= {
            int(query): {"query": int(query), **summary}
            for query, summary in stage.progress.items()
            if query_file(folder, int(query)).exists()
        }
        keep_log_of(folder / "log.jsonl", set(results))
        base = {
            name: p.detach().clone() for name, p in model.denoiser.network.named_parameters() if name in set(trainable)
        }
        todo = [query for query in queries.selected if query not in results]
        with Progress("unlearn", len(queries.selected), "queries", len(queries.selected) - len(todo)) as progress:
            for i in todo:
                restore(model, base)
                started = time.monotonic()
                result = unlearn_one(
                    model, data, queries.image[i], queries.condition_of(i), settings, config, trainable, i, device
                )
                write_tensors(query_file(folder, i), result.tensors)
                append_log(folder / "log.jsonl", i, result)
                summary = result.summary() | {"seconds": round(time.monotonic() - started, 2)}
                results[i] = {"query": i, **summary}
                stage.save_progress(stage.progress | {str(i): summary})
                progress.advance(note=describe(result))
                log.info("unlearn: query %d, %s", i, describe(result))
                if result.reached_bound is False:
                    log.warning(
                        "query %d did not reach the bound %.4f in unlearning.max_steps=%d updates; it is kept as it is",
                        i,
                        config.tolerance * bound,
                        config.max_steps,
                    )
        # what an interrupted attempt with another queries.index has done counts as well
        stage.queries = {query: queries.fingerprints[query] for query in results}
        stage.finish(
            {
                "device": str(device),
                "seeds": {"unlearning": config.seed},
                "learning_rate": settings.learning_rate,
                "null_loss": bound,
                "null_loss_source": source,
                "trainable": trainable,
                "counts": {"queries": len(results), "trainable_tensors": len(trainable)},
                "results": [results[query] for query in sorted(results)],
            },
            [*(query_file(folder, query) for query in sorted(results)), folder / "log.jsonl"],
        )


def choose_trainable(model: BaseModel, config: UnlearningConfig) -> list[str]:
    """Names of the parameters that unlearning may change; "auto" is mlp for a DiT and all_but_bias for a U-Net."""
    network = model.denoiser.network
    preset = config.trainable
    if preset == "auto":
        transformer = any(name.startswith("transformer_blocks.") for name, _ in network.named_parameters())
        preset = "mlp" if transformer else "all_but_bias"
    try:
        return trainable_names([name for name, _ in network.named_parameters()], preset, config.patterns)
    except ValueError as error:
        key = "unlearning.patterns" if preset == "patterns" else "unlearning.trainable"
        got = config.patterns if preset == "patterns" else preset
        some = ", ".join(name for name, _ in list(network.named_parameters())[:3])
        raise UserError(key, f"got {got}; {error} (its names are like {some}). Choose another.") from error


def choose_null_loss(
    model: BaseModel, data: ImageDataset, config: UnlearningConfig, device: torch.device
) -> tuple[float, str]:
    """The bound, and its source: a number, the closed form of a zero head, or Monte Carlo over the initial weights."""
    value = number_or_word(config.null_loss, "unlearning.null_loss", ("auto", "closed_form", "monte_carlo"))
    if isinstance(value, float):
        return value, "given"
    zero_head = model.denoiser.network.zero_initialised_head
    if value == "closed_form" and not zero_head:
        raise UserError(
            "unlearning.null_loss",
            "got closed_form; this network's output does not start at zero, so that it has none. Use monte_carlo.",
        )
    if value != "monte_carlo" and zero_head:
        return model.denoiser.null_loss(data.mean_square), "closed form of a zero output"
    fresh = model.fresh(config.seed)
    fresh.network.requires_grad_(False).to(device)
    conditional = fresh.network.is_conditional

    def batches() -> Iterator[tuple[Tensor, Tensor | None]]:
        order = ShuffledOrder(len(data.training), config.seed, "null_loss_order")
        count = min(MAX_BATCHES * BATCH_SIZE, len(data.training))
        for start in range(0, count, BATCH_SIZE):
            rows = order.batch(start // BATCH_SIZE, BATCH_SIZE)[: count - start]
            ids = data.training[rows.numpy()]
            yield data.images(ids), data.conditions(ids) if conditional else None

    loss = monte_carlo_null_loss(fresh, batches(), config.seed, device)
    return loss, "Monte Carlo over the model's initial weights"


def unlearn_one(
    model: BaseModel,
    data: ImageDataset,
    query: Tensor,
    condition: Tensor | None,
    settings: UnlearningSettings,
    config: UnlearningConfig,
    trainable: list[str],
    query_id: int,
    device: torch.device,
) -> UnlearningResult:
    """Unlearns one query; its retain batches are training images in an order of its own."""
    order = ShuffledOrder(len(data.training), config.seed, "retain_order", query_id)

    def retain_batch(step: int) -> tuple[Tensor, Tensor | None]:
        ids = data.training[order.batch(step, config.retain_batch_size).numpy()]
        conditions = None if condition is None else data.conditions(ids)
        return data.images(ids).to(device), None if conditions is None else conditions.to(device)

    try:
        return unlearn(
            model.denoiser,
            trainable,
            query.to(device),
            None if condition is None else condition.to(device),
            retain_batch,
            settings,
            config.seed,
            query_id,
        )
    except NonFiniteLossError as error:
        raise UserError(
            "unlearning.learning_rate",
            f"got a non-finite loss ({error.value}) at step {error.step} of query {query_id} "
            f"with {settings.learning_rate:g}. "
            "Lower it; the queries before are kept.",
        ) from error


@torch.no_grad()
def restore(model: BaseModel, base: dict[str, Tensor]) -> None:
    """Puts the base model's weights back."""
    for name, parameter in model.denoiser.network.named_parameters():
        if name in base:
            parameter.copy_(base[name])


def describe(result: UnlearningResult) -> str:
    end = {True: "bound reached", False: "bound NOT reached", None: "exact step count"}[result.reached_bound]
    last = f", forget loss {result.log[-1].forget_loss:.3f}" if result.log else ""
    return f"{result.num_steps} steps, {end}{last}"


def append_log(path: Path, query: int, result: UnlearningResult) -> None:
    with path.open("a") as file:
        for entry in result.log:
            record = {
                "query": query,
                "step": entry.step,
                "retain_loss": entry.retain_loss,
                "forget_loss": entry.forget_loss,
            }
            file.write(json.dumps(record) + "\n")


def keep_log_of(path: Path, queries: set[int]) -> None:
    """Drops lines of queries that an interrupted attempt did not finish."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            if json.loads(line)["query"] in queries:
                lines.append(line + "\n")
        except ValueError:  # cut short by a crash
            continue
    write_text(path, "".join(lines))
