"""Weights of metrics: the safetensors files that ``scripts/convert/`` writes, marked with the metric they are for."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mucs_cli.artifacts import read_tensors, write_tensors
from mucs_cli.errors import UserError
from mucs_cli.files import user_path

METADATA_KEY = "mucs_metric"
Network = TypeVar("Network", bound=nn.Module)


def weight_shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what the network computes with; the counters of batch normalisation are not."""
    state = network.state_dict()
    return {name: tuple(value.shape) for name, value in state.items() if not name.endswith("num_batches_tracked")}


def difference(tensors: Mapping[str, Tensor], network: nn.Module) -> str | None:
    """What keeps tensors from being the network's weights, for a message; None where nothing does."""
    shapes = weight_shapes(network)
    for name, shape in shapes.items():
        if name not in tensors:
            return f"lacks {name}"
        if tuple(tensors[name].shape) != shape:
            return f"has {name} of shape {list(tensors[name].shape)}, where {list(shape)} is expected"
        if not bool(tensors[name].isfinite().all()):
            return f"has {name} with values that are not finite"
    unknown = [name for name in tensors if name not in shapes]
    return f"has {unknown[0]}, which is not known" if unknown else None


def write_weights(path: Path, metric: str, tensors: Mapping[str, Tensor]) -> None:
    """Saves a metric's weights as float32."""
    write_tensors(path, {name: tensor.float() for name, tensor in tensors.items()}, {METADATA_KEY: metric})


def load_weights(network: Network, metric: str, path: str, key: str) -> Network:
    """The network in eval mode, without gradients, with the weights of a file.

    Args:
        metric: whose weights the file must hold.
        path, key: the configuration's, for messages.
    Raises:
        UserError: the file is not there, damaged, not one that the converter wrote, or another metric's.
    """
    file = user_path(path)
    expected = f"expected the file that scripts/convert/{metric}.py wrote"
    if not file.is_file():
        raise UserError(key, f"got {path}, which is not there or no file; {expected}. See docs/metrics.md.")
    try:
        with safe_open(file, framework="pt") as opened:
            found = (opened.metadata() or {}).get(METADATA_KEY)
    except (SafetensorError, OSError) as error:
        raise UserError(
            key, f"got {path}, which is truncated or no safetensors file ({error}); {expected}. Convert the weights."
        ) from error
    if found != metric:
        got = "a safetensors file of something else" if found is None else f"the weights of {found}"
        raise UserError(key, f"got {path}, {got}; {expected}. Correct it.")
    tensors = read_tensors(file)
    wrong = difference(tensors, network)
    if wrong is not None:
        raise UserError(key, f"got {path}, which {wrong}; {expected}. Convert the weights again.")
    network.load_state_dict(tensors, strict=False)  # without the counters of batch normalisation
    return network.eval().requires_grad_(False)
