"""Generating queries with the base model: their conditions, and the sampler in batches that fit into memory."""

from pathlib import Path

import torch
from torch import Tensor

from mucs_cli.artifacts import fingerprint, read_kept, write_tensors
from mucs_cli.data.images import ImageDataset
from mucs_cli.diffusion.ddpm import DDPMDenoiser
from mucs_cli.diffusion.sampler import sample
from mucs_cli.errors import UserError
from mucs_cli.rng import ShuffledOrder
from mucs_cli.runtime import REHEARSED_SECONDS, Progress, smaller_batch
from mucs_cli.schemas import SampledQueriesConfig
from mucs_cli.stages.context import Context
from mucs_cli.stages.loading import BaseModel, Inputs


def refuse_sampler_keys(context: Context, model: BaseModel) -> None:
    """Raises UserError for typed keys that an unconditional model, or one with a discrete schedule, does not use."""
    if "sampler.guidance" in context.typed and not model.denoiser.network.is_conditional:
        raise UserError("sampler.guidance", "has no effect on a model without conditions. Leave it out.")
    if isinstance(model.denoiser, DDPMDenoiser):
        for key in ("sampler.sigma_min", "sampler.sigma_max", "sampler.rho"):
            if key in context.typed:
                raise UserError(key, "has no effect on a discrete schedule, which has levels of its own. Leave it out.")


def query_conditions(model: BaseModel, data: ImageDataset, config: SampledQueriesConfig) -> Tensor | None:
    """What each query is sampled under; None for an unconditional model.

    Labels: the chosen classes in turn. Vectors: those of held-out images, or of training images where there are none,
    drawn from the stream ("query_condition").
    """
    network, classes, count = model.denoiser.network, config.classes, config.num
    num_classes = network.num_classes
    if not num_classes:
        if classes is not None:
            raise UserError("queries.classes", f"got {classes}; the model has no classes. Leave it out.")
        if not network.is_conditional:
            return None
        ids = data.held_out if len(data.held_out) else data.training
        order = ShuffledOrder(len(ids), config.seed, "query_condition")
        return data.conditions(ids[order.batch(0, count).numpy()])
    classes = list(range(num_classes)) if classes is None else classes
    if not classes or not all(0 <= c < num_classes for c in classes):
        raise UserError("queries.classes", f"got {classes}; expected classes from 0 to {num_classes - 1}.")
    return torch.tensor([classes[i % len(classes)] for i in range(count)])


def generate(
    context: Context, inputs: Inputs, seeds: Tensor, condition: Tensor | None, folder: Path | None = None
) -> Tensor:
    """Samples one image a seed; [Q, C, H, W], float32, on the CPU; clipped to [-1, 1] unless they are latents.

    Args:
        context, inputs: sampler and model.
        seeds: [Q].
        condition: of every image, or None.
        folder: keeps finished batches, where there are several; an attempt that was interrupted left some.
    """
    settings, model, device = context.config.sampler, inputs.model, inputs.device
    shape = (inputs.data.channels, inputs.data.height, inputs.data.width)
    network = model.denoiser.network
    if settings.guidance != 1 and network.is_conditional and not network.has_null_condition:
        raise UserError("sampler.guidance", f"got {settings.guidance}; the model has no null condition. Set it to 1.")
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(int(s))) for s in seeds])
    guided = settings.guidance != 1
    images: list[Tensor] = []
    done, size, steps = 0, settings.batch_size, 0
    with Progress("sample", len(seeds), "images", leave_after=REHEARSED_SECONDS) as progress:

        def on_step(sigma: Tensor, image: Tensor) -> None:
            nonlocal steps
            steps += 1
            progress.advance(0, begun=len(image) * steps / settings.num_steps)

        while done < len(seeds):
            part = slice(done, done + size)
            steps = 0
            label = None if condition is None else condition[part].to(device)
            key = fingerprint(seeds[part], *([] if condition is None else [condition[part]]))[:16]
            kept = None if folder is None or len(seeds) <= size else folder / f"{key}.safetensors"
            if kept is not None and (left := read_kept(kept, {"image": "float32 Q C H W"}, Q=len(seeds[part]))):
                images.append(left["image"])
                done += len(images[-1])
                progress.advance(len(images[-1]))
                continue
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
                    on_step=on_step,
                )
            except RuntimeError as error:
                size = smaller_batch(error, min(size, len(seeds)), "sampler.batch_size")
                continue
            images.append(batch.cpu())
            if kept is not None:
                write_tensors(kept, {"image": images[-1]})
            done += len(batch)
            progress.advance(len(batch))
    image = torch.cat([*images, noise[done:]])  # noise in place of what a rehearsal leaves out
    if not image.isfinite().all():
        raise UserError(
            "sampler", "got samples that are not finite. Train the model longer or with a lower learning rate."
        )
    return image.clamp(-1, 1) if model.codec is None else image
