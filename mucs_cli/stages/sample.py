"""``mucs sample``: generates the queries, each from a random stream of its own."""

import math
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mucs_cli.artifacts import write_atomic, write_tensors
from mucs_cli.config import QueriesConfig
from mucs_cli.data.dataset import ImageDataset
from mucs_cli.diffusion.sampler import sample
from mucs_cli.errors import UserError
from mucs_cli.rng import ShuffledOrder, derive_seed
from mucs_cli.runtime import Progress, log, log_file, smaller_batch
from mucs_cli.stages.context import Context
from mucs_cli.stages.loading import BaseModel, load_base_model, load_data, prepare_device


def run(context: Context) -> None:
    """Writes ``sample/``: ``samples.safetensors``, ``grid.png`` and the manifest."""
    config = context.config
    device = prepare_device(context)
    data = load_data(context)
    model = load_base_model(context, data, device)
    folder = context.folder("sample")
    stage = context.stage(folder, "sample", sections=("sampler", "queries"), inputs={"model": model.fingerprint})
    if stage.is_done():
        log.info("sample: up to date (%s)", folder)
        return
    stage.begin()
    with log_file(folder / "log.txt"):
        seeds = torch.tensor([derive_seed(config.queries.seed, "query", i) for i in range(config.queries.num)])
        condition = query_conditions(model, data, config.queries)
        image = generate(context, model, seeds, condition, (data.channels, data.height, data.width), device)
        tensors = {"image": image, "seed": seeds, "role": torch.zeros(len(image), dtype=torch.int64)}
        if condition is not None:
            tensors["condition"] = condition
        write_tensors(folder / "samples.safetensors", tensors, {"role": "0 target, 1 control"})
        write_grid(image, folder / "grid.png")
        stage.finish(
            {"device": str(device), "seeds": {"queries": config.queries.seed}, "counts": {"queries": len(image)}},
            [folder / "samples.safetensors", folder / "grid.png"],
        )
        log.info("sample: %d queries, pictures in %s", len(image), folder / "grid.png")


def query_conditions(model: BaseModel, data: ImageDataset, config: QueriesConfig) -> Tensor | None:
    """What each query is sampled under; None for an unconditional model.

    Labels: the chosen classes in turn. Vectors: those of training images drawn from the stream ("query_condition").
    """
    network, classes, count = model.denoiser.network, config.classes, config.num
    num_classes = network.num_classes
    if not num_classes:
        if classes is not None:
            raise UserError("queries.classes", f"got {classes}; the model has no classes. Leave it out.")
        if not network.is_conditional:
            return None
        order = ShuffledOrder(len(data.training), config.seed, "query_condition")
        return data.conditions(data.training[order.batch(0, count).numpy()])
    classes = list(range(num_classes)) if classes is None else classes
    if not classes or not all(0 <= c < num_classes for c in classes):
        raise UserError("queries.classes", f"got {classes}; expected classes from 0 to {num_classes - 1}.")
    return torch.tensor([classes[i % len(classes)] for i in range(count)])


def generate(
    context: Context,
    model: BaseModel,
    seeds: Tensor,
    condition: Tensor | None,
    shape: tuple[int, int, int],
    device: torch.device,
) -> Tensor:
    """Samples one image a seed; [Q, C, H, W], float32, clipped to [-1, 1], on the CPU."""
    settings = context.config.sampler
    network = model.denoiser.network
    if settings.guidance != 1 and network.is_conditional and not network.has_null_condition:
        raise UserError("sampler.guidance", f"got {settings.guidance}; the model has no null condition. Set it to 1.")
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(int(s))) for s in seeds])
    guided = settings.guidance != 1
    images: list[Tensor] = []
    done, size = 0, settings.batch_size
    with Progress("sample", len(seeds), "images") as progress:
        while done < len(seeds):
            part = slice(done, done + size)
            label = None if condition is None else condition[part].to(device)
            try:
                batch = sample(
                    model.denoiser,
                    noise[part].to(device),
                    label,
                    null_condition=network.null_condition(label) if label is not None and guided else None,
                    guidance=1.0 if label is None else settings.guidance,
                    num_steps=settings.num_steps,
                    sigma_min=settings.sigma_min,
                    sigma_max=settings.sigma_max,
                    rho=settings.rho,
                )
            except RuntimeError as error:
                size = smaller_batch(error, min(size, len(seeds)), "sampler.batch_size")
                continue
            images.append(batch.cpu())
            done += len(batch)
            progress.advance(len(batch))
    image = torch.cat(images)
    if not image.isfinite().all():
        raise UserError(
            "sampler", "got samples that are not finite. Train the model longer or with a lower learning rate."
        )
    return image.clamp(-1, 1)


def write_grid(image: Tensor, path: Path, columns: int = 10, gap: int = 1) -> None:
    """All images in rows of ten with gaps between them, each enlarged to at least 64 pixels."""
    count, channels, height, width = image.shape
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    canvas = torch.zeros(channels, rows * (height + gap) + gap, columns * (width + gap) + gap)
    for i in range(count):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        canvas[:, top : top + height, left : left + width] = (image[i] + 1) / 2
    pixels = (canvas * 255).round().byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
    scale = max(1, math.ceil(64 / height))
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    write_atomic(path, lambda temporary: picture.save(temporary, format="PNG"))
