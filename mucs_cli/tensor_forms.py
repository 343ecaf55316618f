"""What the tensors of a run's files are to be: a hash that is right says nothing about what its writer put in.

A form is a type and a letter for each dimension, ``float32 Q C H W``: any size but 0, the same wherever a letter stands
again in a file. Forms of which a tensor may have either are separated by ``|``. A name that ends with ``?`` may be
missing.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mucs_cli.errors import DamagedError

SCORE_FORMS = {"score": "float32 Q N", "query_id": "int64 Q", "example_id": "int64 N", "draws?": "int32 Q N"}
SAMPLE_FORMS = {
    "image": "float32 Q C H W",
    "picture?": "float32 Q c h w",
    "role?": "int64 Q",
    "seed?": "int64 Q",
    "condition?": "int64 Q | float32 Q d",
}
IMAGE_FORMS = {"image": "uint8 N C H W"}


def require_forms(
    path: Path, found: Mapping[str, Tensor | NDArray], forms: Mapping[str, str], command: str, **sizes: int
) -> None:
    """Raises DamagedError where a tensor of a file is missing, or has another type or shape than its form.

    Args:
        path: of the file, for the message.
        found: its tensors.
        forms: name -> form.
        command: the command that writes the file, for the message.
        sizes: of dimensions that are known already, by letter.
    """
    for key, form in forms.items():
        name = key.removesuffix("?")
        if name not in found and key.endswith("?"):
            continue
        if name not in found or not any(fits(found[name], each.split(), sizes) for each in form.split("|")):
            got = f"{dtype_of(found[name])} {list(found[name].shape)}" if name in found else "none"
            known = ", ".join(f"{letter} = {size}" for letter, size in sizes.items() if letter in form.split())
            raise DamagedError(
                str(path),
                f"got {got} for {name!r}; expected {form}{f' with {known}' if known else ''}. "
                f"Rerun mucs {command} with overwrite=true.",
            )


def require_scores(path: Path, found: Mapping[str, Tensor | NDArray], **sizes: int) -> None:
    """``require_forms`` of a score file; and every query and every image is in it once, in order."""
    require_forms(path, found, SCORE_FORMS, "score", **sizes)
    for name in ("query_id", "example_id"):
        ids = np.asarray(found[name])
        if ids[0] < 0 or (np.diff(ids) <= 0).any():
            raise DamagedError(
                str(path), f"got {name} that do not ascend from 0 or more. Rerun mucs score with overwrite=true."
            )


def require_finite(path: Path, found: Mapping[str, Tensor], command: str) -> None:
    """Raises DamagedError where a number in a file's tensors is NaN or infinite."""
    for name, tensor in found.items():
        if not tensor.isfinite().all():
            raise DamagedError(
                str(path), f"got values for {name!r} that are not finite. Rerun mucs {command} with overwrite=true."
            )


def fits(tensor: Tensor | NDArray, form: list[str], sizes: dict[str, int]) -> bool:
    """Whether a tensor has this form; notes the sizes that it gives to letters."""
    dtype, *letters = form
    if dtype_of(tensor) != dtype or len(tensor.shape) != len(letters) or 0 in tensor.shape:
        return False
    return all(sizes.setdefault(letter, size) == size for letter, size in zip(letters, tensor.shape, strict=True))


def dtype_of(tensor: Tensor | NDArray) -> str:
    return str(tensor.dtype).removeprefix("torch.")
