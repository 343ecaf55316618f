"""A slice of what the reliability scripts try by the thousand."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parent.parent / "scripts" / "reliability"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"reliability_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fuzz, faults = load("fuzz"), load("faults")


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_every_parser_reads_or_refuses_whatever_it_is_given(name: str) -> None:
    outcome = fuzz.run_target(name, 40)
    assert outcome.total() >= 20
    assert outcome["read"] > 0
    assert outcome["refused"] > 0 or name in (
        "status",
        "progress.jsonl",
        "log.jsonl",
    )  # which show and keep what they can


@pytest.mark.parametrize("name", ["results", "evaluations", "ensembles"])
def test_the_run_that_the_fuzzer_damages_is_read_to_the_end(name: str, tmp_path: Path) -> None:
    from fuzz_run import sound_run

    fuzz.TARGETS[name].read(tmp_path, sound_run())
    assert len(fuzz.RunResults(tmp_path).variants) == 3
    assert len(fuzz.ensemble_views(fuzz.RunResults(tmp_path))) == 1
    assert len(fuzz.evaluation_views(fuzz.RunResults(tmp_path), images=True)[0].rows) == 2


def test_the_fuzzer_finds_a_parser_that_crashes(monkeypatch: pytest.MonkeyPatch) -> None:
    def fragile(folder: Path, content: bytes) -> None:
        fuzz.json.loads(content)

    monkeypatch.setitem(fuzz.TARGETS, "fragile", fuzz.Target(fuzz.TARGETS["manifest.json"].inputs, fragile))
    with pytest.raises(ValueError):
        fuzz.run_target("fragile", 100)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> "faults.Runs":  # type: ignore[name-defined]
    return faults.Runs(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize(
    ("what", "kind"),
    [
        ("bit flipped", "preconditioning"),
        ("bit flipped", "noise bank"),
        ("bit flipped", "index"),
        ("bit flipped", "model's manifest"),
        ("bit flipped", "retrained model"),
        ("cut short", "growing losses"),
        ("cut short", "run.json"),
        ("cut short", "unlearned query"),
        ("removed", "evaluation"),
        ("removed", "query's features"),
        ("disk full", "scoring"),
        ("upstream changed", "other queries, then score"),
    ],
)
def test_a_fault_ends_in_one_line_or_the_sound_result(what: str, kind: str, runs: ModuleType) -> None:
    outcome, details = faults.faults()[what, kind](runs, faults.random.Random(f"{what} {kind}"))
    assert outcome in faults.GOOD, details


def test_what_is_made_of_a_fault_is_judged(runs: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that does not check its file is found out."""
    from safetensors.torch import load_file

    from mucs_cli.stages import unlearned

    monkeypatch.setattr(unlearned, "read_tensors", lambda path, sha256: load_file(path))
    trial = faults.faults()["bit flipped", "unlearned query"]
    assert "OTHER RESULT" in {trial(runs, faults.random.Random(number))[0] for number in range(3)}
