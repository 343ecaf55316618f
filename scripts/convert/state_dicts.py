"""What the converters share: published weights are read, and the errors that end a converter are printed."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mucs_cli.errors import UserError
from mucs_cli.evaluation.measures.metric_weights import difference


def read_state_dict(path: Path, expected: str) -> dict[str, Tensor]:
    """The tensors of a .pth or .pt file; nothing but tensors is read from it, and no code of it is run.

    Raises:
        UserError: it is not there, or holds something else.
    """
    require_file(path, expected)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the parsers of its formats raise
        text = str(error).strip().split("\n")[0]
        raise UserError(str(path), f"cannot be read as tensors ({text}); expected {expected}. Correct it.") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(str(path), f"got no mapping of names to tensors; expected {expected}. Correct it.")
    return dict(state)


def require_file(path: Path, expected: str) -> None:
    if not path.is_file():
        raise UserError(str(path), f"not found; expected {expected}. Correct it.")


def refuse_difference(tensors: Mapping[str, Tensor], network: nn.Module, source: str, expected: str) -> None:
    """Raises UserError where tensors are not the weights of the network."""
    wrong = difference(tensors, network)
    if wrong is not None:
        raise UserError(source, f"{wrong}; expected {expected}. Use that one.")


def run(name: str, main: Callable[[list[str]], None]) -> None:
    """A converter as a command: a wrong file is one line and exit code 2."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        sys.exit(2)
