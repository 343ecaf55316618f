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
    assert outcome["refused"] > 0
    assert outcome.total() >= 20


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
        ("upstream changed", "other unlearning, then score"),
    ],
)
def test_a_fault_ends_in_one_line_or_the_sound_result(what: str, kind: str, runs: ModuleType) -> None:
    outcome, details = faults.faults()[what, kind](runs, faults.random.Random(f"{what} {kind}"))
    assert outcome in faults.GOOD, details


def test_what_is_made_of_a_fault_is_judged(runs: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that does not check its file is found out."""
    from mucs_cli.reporting import results

    monkeypatch.setattr(results, "check_file", lambda *_: None)
    trial = faults.faults()["bit flipped", "index"]
    outcomes = {trial(runs, faults.random.Random(number))[0] for number in range(8)}
    assert outcomes - set(faults.GOOD)
