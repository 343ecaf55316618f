"""The benchmarks say what they take: each is imported, with all that it imports, and shows its help."""

import runpy
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "scripts" / "bench"
SCRIPTS = sorted(path.stem for path in BENCH.glob("*.py") if "argparse" in path.read_text())


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_benchmark_shows_its_help(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(BENCH / f"{name}.py"), run_name="__main__")
    assert left.value.code == 0
    assert f"python scripts/bench/{name}.py" in capsys.readouterr().out
