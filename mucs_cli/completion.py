"""Completion in the shell: commands from here, the rest from the command's own Hydra application."""

import os
from collections.abc import Callable

from mucs_cli.config import COMMANDS, known_keys


def complete(forward: Callable[[str], object]) -> None:
    """Prints what can stand at the end of the line in the environment variables COMP_LINE and COMP_POINT.

    Args:
        forward: lets a command's Hydra application answer, for the same line without the command.
    """
    line = os.environ.get("COMP_LINE", "")
    line = line[: int(os.environ.get("COMP_POINT") or len(line))]
    typed = line.split()
    if line.endswith(" ") or not typed:
        typed.append("")
    if len(typed) <= 2:
        print(" ".join(name for name in (*COMMANDS, "help") if name.startswith(typed[-1])))
        return
    program, command, *earlier, last = typed
    if command not in COMMANDS or last.startswith("-"):
        return
    key, equals, start = last.partition("=")
    choices = choices_of(command, key)
    if equals and choices:
        print(" ".join(f"{key}={choice}" for choice in choices if choice.startswith(start)))
        return
    os.environ["COMP_LINE"] = " ".join([program, *(word for word in earlier if "=" in word), last])
    os.environ["COMP_POINT"] = str(len(os.environ["COMP_LINE"]))
    forward(command)


def choices_of(command: str, key: str) -> list[str]:
    """The values a key can take, where they can be listed."""
    entry = known_keys(COMMANDS[command].schema).get(key)
    if entry is None:
        return []
    return ["true", "false"] if entry.type is bool else list(entry.metadata["choices"] or ())
