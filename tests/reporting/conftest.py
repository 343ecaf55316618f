"""Finished runs to report on."""

from collections.abc import Callable
from pathlib import Path

import pytest
from reporting_runs import RunBuilder


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., RunBuilder]:
    return lambda **arguments: RunBuilder(tmp_path / "run", **arguments)


@pytest.fixture
def finished(make_run: Callable[..., RunBuilder]) -> RunBuilder:
    """A run with one variant."""
    return make_run().all()
