"""AbU's Fisher information in a run: computed once, kept below ``unlearn/_fisher/``."""

import time

from torch import Tensor

from mucs_cli.artifacts import fingerprint, read_kept, read_tensors, write_tensors
from mucs_cli.attribution.fisher import DiagonalFisher
from mucs_cli.errors import UserError
from mucs_cli.interruption import held_back, saving
from mucs_cli.runtime import REHEARSED_SECONDS, Progress, log, smaller_batch
from mucs_cli.stage_folder import Stage
from mucs_cli.stages.work import Work

BATCH_SIZE = 16
"""Images whose gradients are in memory at once; it decides nothing but speed."""


def load_fisher(work: Work, names: list[str], seed: int, num_passes: int, flip: bool) -> dict[str, Tensor]:
    """F of the named parameters, from the run or computed into it; name -> float64, on the CPU.

    Args:
        work: model and training images.
        names: the parameters.
        seed, flip: see ``DiagonalFisher``.
        num_passes: passes over the training images.
    Raises:
        UserError: a gradient is not finite.
    """
    data, model = work.inputs.data, work.inputs.model
    inputs = {"dataset": data.fingerprint, "model": model.fingerprint, "parameters": fingerprint(names)}
    config = {"seed": seed, "num_passes": num_passes, "flip": flip}
    folder = work.context.folder("unlearn", "_fisher", fingerprint(inputs, config)[:16])
    stage = Stage(folder, "unlearn", {"config": config, "inputs": inputs}, replace=True)
    path, state = folder / "fisher.safetensors", folder / "state.safetensors"
    if stage.is_done():
        return read_tensors(path)
    stage.begin()
    fisher = DiagonalFisher(model.denoiser, names, seed, flip)
    left = read_kept(state, {})
    if {name: sums.shape for name, sums in left.items()} == {name: sums.shape for name, sums in fisher.state().items()}:
        fisher.load_state(left)
    visits, size, saved = (2 if flip else 1), BATCH_SIZE, time.monotonic()
    done, total = fisher.num_visits // visits, num_passes * work.num_images

    def save() -> None:
        write_tensors(state, fisher.state())

    with saving(save), Progress("Fisher information", total, "images", done, REHEARSED_SECONDS) as progress:
        while done < total:
            pass_index, start = divmod(done, work.num_images)
            ids = data.training[start : start + size]
            image = data.images(ids).to(work.inputs.device)
            condition = data.conditions(ids) if work.is_conditional else None
            condition = None if condition is None else condition.to(image.device)
            before = fisher.num_visits
            try:
                with held_back():
                    fisher.add(image, condition, ids.tolist(), pass_index)
            except FloatingPointError as error:
                raise UserError("method", f"got abu; {error}. Train the model longer, or check the images.") from error
            except RuntimeError as error:
                if fisher.num_visits != before:  # half a batch is in the sums already
                    raise
                size = smaller_batch(error, size, "method.trainable")
                continue
            done += len(ids)
            progress.advance(len(ids))
            if time.monotonic() - saved > work.config.checkpoint.every_seconds:
                save()
                saved = time.monotonic()
    found = {name: value.cpu() for name, value in fisher.diagonal().items()}
    write_tensors(path, found)
    stage.finish({"counts": {"visits": fisher.num_visits}}, [path])
    state.unlink(missing_ok=True)
    log.info("unlearn: Fisher information over %d visits, in %s", fisher.num_visits, folder)
    return found
