"""What the tensors of a run's files are to be: a hash that is right says nothing about what its writer put in.

A form is a type and a letter for each dimension, ``float32 Q C H W``: any size but 0, the same wherever a letter stands
again in a file. Forms of which a tensor may have either are separated by ``|``. A name that ends with ``?`` may be
missing.
"""

from collections.abc import Mapping
from pathlib import Path

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


def fits(tensor: Tensor | NDArray, form: list[str], sizes: dict[str, int]) -> bool:
    """Whether a tensor has this form; notes the sizes that it gives to letters."""
    dtype, *letters = form
    if dtype_of(tensor) != dtype or len(tensor.shape) != len(letters) or 0 in tensor.shape:
        return False
    return all(sizes.setdefault(letter, size) == size for letter, size in zip(letters, tensor.shape, strict=True))


def dtype_of(tensor: Tensor | NDArray) -> str:
    return str(tensor.dtype).removeprefix("torch.")
