"""Models of the ``transformers`` library: from safetensors only, by its own classes, never with code or a pickle."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from mucs_cli.errors import UserError


def import_transformers(key: str, path: str, extra: str) -> Any:
    """The library.

    Args:
        key, path: the configuration's, for the message.
        extra: the project's extra that brings it.
    Raises:
        UserError: it is not installed.
    """
    try:
        return import_module("transformers")
    except ImportError as error:
        raise UserError(
            key, f"got {path}; the transformers library is not installed. Run: pip install 'mucs[{extra}]'"
        ) from error


@contextmanager
def loading(key: str, path: str, expected: str) -> Iterator[None]:
    """Anything that the library raises inside becomes a UserError; its reports and bars stay off the terminal."""
    logging: Any = import_module("transformers.utils.logging")
    level, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except Exception as error:  # the library raises whatever its file systems, parsers and servers raise
        text = str(error).strip().split("\n")[0]
        raise UserError(
            key, f"got {path}, which cannot be loaded ({text}); expected {expected}. Correct it."
        ) from error
    finally:
        logging.set_verbosity(level)
        if has_bars:
            logging.enable_progress_bar()


def load_model(model_class: Any, name: str, key: str, path: str, expected: str, **options: Any) -> Any:
    """A model in eval mode, float32, without gradients, on the CPU.

    Args:
        model_class: a class of the library; a class that a checkpoint brings along is never looked for.
        name: a folder, or a name on the hub.
        key, path: the configuration's, for messages.
        expected: what the model should be, for messages.
        options: handed to ``from_pretrained``.
    Raises:
        UserError: it cannot be loaded, or lacks weights.
    """
    with loading(key, path, expected):
        model, info = model_class.from_pretrained(name, use_safetensors=True, output_loading_info=True, **options)
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise UserError(key, f"got {path}, which lacks {missing}; expected {expected}. Use another.")
    return model.float().eval().requires_grad_(False)
