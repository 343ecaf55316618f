"""What tests of interrupted commands share: commands that end as if killed, and files compared with a whole run's."""

from pathlib import Path
from typing import Any

import pytest

from mucs_cli.cli import main


class Killed(BaseException):
    """As ``kill -9``: nothing of ours sees it."""


def stop_after(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls: int, error: type[BaseException]) -> None:
    """The error in the place of the call after so many."""
    whole, seen = getattr(owner, name), []

    def counted(*arguments: Any, **keywords: Any) -> Any:
        seen.append(1)
        if len(seen) > calls:
            raise error
        return whole(*arguments, **keywords)

    monkeypatch.setattr(owner, name, counted)


def calls_of(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[int]:
    """Grows with every call."""
    whole, seen = getattr(owner, name), list[int]()
    monkeypatch.setattr(owner, name, lambda *a, **k: (seen.append(1), whole(*a, **k))[1])
    return seen


def stop(error: type[BaseException], *command: str) -> None:
    if error is Killed:
        with pytest.raises(Killed):
            main(list(command))
    else:
        assert main(list(command)) == 130


def assert_same_files(run: Path, finished: Path, folder: str) -> None:
    """Tensors, and the tables and logs without times."""
    names = [
        path.relative_to(finished)
        for path in (finished / folder).rglob("*")
        if path.suffix in (".safetensors", ".csv") or path.name == "log.jsonl"
    ]
    names = [name for name in names if "checkpoint" not in name.parts]
    assert names
    for name in names:
        assert (run / name).read_bytes() == (finished / name).read_bytes(), name
