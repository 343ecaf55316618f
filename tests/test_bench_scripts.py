"""The benchmarks say what they take, and the cheap ones run: on next to nothing, as only that they do counts here."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from mucs_cli.cli import main

BENCH = Path(__file__).parent.parent / "scripts" / "bench"
SCRIPTS = sorted(path.stem for path in BENCH.glob("*.py") if "argparse" in path.read_text())
TINY = [
    *("experiment=digits", "device=cpu", "data.limit=48", "model.width=16", "training.num_steps=20", "queries.num=2"),
    *("training.warmup_steps=1", "sampler.num_steps=2", "unlearning.num_steps=2", "stages=[train,sample,unlearn]"),
]
SMALLEST = {
    "data": ["--images", "8", "--size", "16", "--repeats", "1"],
    "draws": ["--queries", "1", "--draws", "2", "--banks", "2", "--images", "16"],
    "prefix": ["--model", "dit-tiny", "--queries", "2", "--images", "2", "--draws", "2"],
    "score_throughput": ["--model", "unet-tiny", "--images", "32", "--draws", "1"],
    "unlearn_throughput": ["--model", "dit-16", "--images", "16", "--steps", "3", "--stack", "2"],
}


def run(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(BENCH / f"{name}.py"), run_name="__main__")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_benchmark_shows_its_help(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        run(name, ["--help"], monkeypatch)
    assert left.value.code == 0
    assert f"python scripts/bench/{name}.py" in capsys.readouterr().out


@pytest.mark.parametrize("name", SMALLEST)
def test_a_benchmark_gives_figures(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = SMALLEST[name]
    if name == "draws":
        assert main(["run", f"run={tmp_path}", *TINY]) == 0
        capsys.readouterr()
        (unlearned,) = (tmp_path / "unlearn").iterdir()
        arguments = [str(tmp_path), "--variant", unlearned.name, *arguments]
    run(name, arguments, monkeypatch)
    result = json.loads(capsys.readouterr().out)
    assert result.pop("benchmark") == name
    assert any(isinstance(figure, float) and figure > 0 for figure in result.values())


def test_operands_are_rounded_to_the_ten_bits_of_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])
    script = runpy.run_path(str(BENCH / "precision.py"))
    step = 2.0**-10  # between 1 and 2
    values = torch.tensor([1, 1 + 0.4 * step, 1 + 0.6 * step, -1 - 0.6 * step, 3 * (1 + step), 0])
    assert script["to_tf32"](values).tolist() == [1, 1, 1 + step, -1 - step, 3 + 4 * step, 0]
    with script["TF32Products"]() as products:
        found = torch.nn.functional.linear(values[2:3], torch.tensor([[1 + 0.4 * step]]))
    assert (found.item(), products.count) == (1 + step, 1)
