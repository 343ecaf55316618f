"""The store of gradient features: shared, resumable, added to query by query, listed and cleaned."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import mucs
from gradient_runs import NUM_QUERIES, QUICK, make_run, score, variants
from safetensors.torch import load_file

from mucs_cli.attribution import gradient_features
from mucs_cli.cli import main
from mucs_cli.stages import feature_store
from mucs_cli.stages.feature_settings import choose_block_size
from mucs_cli.stages.memory import free_of_container, free_of_machine

NUM_PARAMETERS = 14_948
SMALL_BLOCKS = f"score.memory_budget={20 * 8 * NUM_PARAMETERS / 2**30}"
"""Room for 20 gradients: blocks of 16, of which the run has three."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "digits")


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "digits"))


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batch sizes of what is computed."""
    sizes: list[int] = []

    def counted(denoiser: object, names: object, image: torch.Tensor, *arguments: object) -> torch.Tensor:
        sizes.append(len(image))
        return gradient_features.features(denoiser, names, image, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(feature_store, "features", counted)
    return sizes


def stored(run: Path) -> list[Path]:
    return sorted((run / "score").glob("_*/*/*.safetensors"))


def test_methods_and_settings_with_the_same_gradients_share_them(run: Path, computed: list[int]) -> None:
    score(run, "trak", *QUICK)
    files = {path: path.stat().st_mtime_ns for path in stored(run)}
    assert {path.name.split("_")[0] for path in files} == {"features.safetensors", "query"}
    assert len(computed) == 2  # a block of training images, and the queries together
    score(run, "tracin", *QUICK)
    score(run, "relative_if", *QUICK)
    score(run, "trak", *QUICK, "method.damping=1")
    assert {path: path.stat().st_mtime_ns for path in stored(run)} == files
    assert len(computed) == 2

    score(run, "dtrak", *QUICK)
    assert len(computed) == 4
    score(run, "das", *QUICK)
    files = {path: path.stat().st_mtime_ns for path in stored(run)}
    for keys in ("square=false", "leverage=false", "residual=code", "residual=none", "damping=1"):
        score(run, "das", *QUICK, f"method.{keys}")
    assert {path: path.stat().st_mtime_ns for path in stored(run)} == files
    assert len(computed) == 6
    score(run, "das", *QUICK, "method.num_projections=65")
    assert len(list((run / "score" / "_noise_errors").iterdir())) == 1  # which know no projection
    assert len(computed) == 8


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_interrupted_features_go_on_to_the_same_bits(
    calls: int, run: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_run = Path(shutil.copytree(finished, tmp_path / "whole"))
    arguments = ["method=das", *QUICK, SMALL_BLOCKS]
    mucs("score", f"run={whole_run}", *arguments)

    seen: list[int] = []
    limit = calls

    def counted(*arguments: object) -> torch.Tensor:
        if len(seen) == limit:
            raise KeyboardInterrupt
        seen.append(1)
        return gradient_features.features(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(feature_store, "features", counted)
    assert main(["score", f"run={run}", *arguments]) == 130
    limit = 100
    mucs("score", f"run={run}", *arguments)
    assert len(seen) == 4  # three blocks of training images and one of queries: none was computed twice
    names = [path.relative_to(whole_run) for path in (whole_run / "score").rglob("*.safetensors")]
    assert len(names) == NUM_QUERIES + 3
    for name in names:
        assert (run / name).read_bytes() == (whole_run / name).read_bytes(), name


@pytest.mark.parametrize("method", ["trak", "journey_trak"])
def test_new_queries_add_only_theirs_and_have_the_bits_of_a_run_over_all(
    method: str, run: Path, finished: Path, tmp_path: Path, computed: list[int]
) -> None:
    whole_run = Path(shutil.copytree(finished, tmp_path / "whole"))
    mucs("score", f"run={whole_run}", f"method={method}", *QUICK)
    mucs("score", f"run={run}", f"method={method}", *QUICK, "queries.index=[0,2]")
    before = {path: path.stat().st_mtime_ns for path in stored(run)}
    assert len(before) == 3
    computed.clear()
    mucs("score", f"run={run}", f"method={method}", *QUICK)
    after = {path: path.stat().st_mtime_ns for path in stored(run)}
    assert before.items() <= after.items()
    assert len(after) == 4
    assert computed == [16] * (4 if method == "journey_trak" else 1)  # a batch a step of the sampler
    (ours,), (whole,) = variants(run), variants(whole_run)
    assert (ours / "scores.safetensors").read_bytes() == (whole / "scores.safetensors").read_bytes()
    mucs("score", f"run={run}", f"method={method}", *QUICK, "method.damping=1", "queries.index=1")
    assert {path: path.stat().st_mtime_ns for path in stored(run)} == after


def test_damaged_features_are_computed_again(
    run: Path, computed: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    first = score(run, "trak", *QUICK)
    for path in stored(run):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    for folder in variants(run):
        shutil.rmtree(folder)
    computed.clear()
    capsys.readouterr()
    assert torch.equal(score(run, "trak", *QUICK), first)
    assert capsys.readouterr().err.count("is damaged; computing it again") == 1 + NUM_QUERIES
    assert len(computed) == 2


def test_out_of_memory_goes_on_with_a_smaller_block(
    run: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = score(Path(shutil.copytree(finished, tmp_path / "whole")), "trak", *QUICK)

    def starved(denoiser: object, names: object, image: torch.Tensor, *arguments: object) -> torch.Tensor:
        if len(image) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return gradient_features.features(denoiser, names, image, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(feature_store, "features", starved)
    capsys.readouterr()
    found = score(run, "trak", *QUICK)
    assert "out of memory at method.micro_batch_size=24: going on with 12" in capsys.readouterr().err
    torch.testing.assert_close(found, whole, rtol=1e-3, atol=1e-4 * float(whole.abs().max()))
    assert list(json.loads((run / "machine.json").read_text())["feature_block_size"].values()) == [12]


def test_the_block_is_what_the_memory_budget_holds_and_no_more_than_is_needed() -> None:
    assert choose_block_size(20 * 8 * 1000, 1000, 1797, "sparse") == 16
    assert choose_block_size(7 * 8 * 1000, 1000, 1797, "sparse") == 7
    assert choose_block_size(1.0, 1000, 1797, "sparse") == 1
    assert choose_block_size(2**40, 1000, 40, "sparse") == 48
    assert choose_block_size(2**40, 1000, 1797, "sparse") < choose_block_size(2**40, 1000, 1797, "gaussian") < 1797


def test_the_manifest_says_what_the_features_are(run: Path) -> None:
    score(run, "trak", *QUICK)
    (folder,) = (run / "score" / "_features").iterdir()
    inputs = json.loads((folder / "manifest.json").read_text())["inputs"]
    assert inputs["projection"] == {"kind": "sparse", "k": 64, "seed": 0, "nonzeros": 4}
    assert inputs["output"] == "loss"
    assert load_file(folder / "features.safetensors")["feature"].shape == (40, 64)
    (variant,) = variants(run)
    manifest = json.loads((variant / "manifest.json").read_text())
    assert manifest["kernel"] == "dual"
    assert manifest["parameters"] == NUM_PARAMETERS
    assert manifest["inputs"]["features"].startswith(folder.name)


def test_status_lists_and_cleans_what_variants_share(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = score(run, "das", *QUICK)
    shared = sorted(path.relative_to(run).as_posix() for path in (run / "score").glob("_*/*"))
    assert len(shared) == 2
    capsys.readouterr()
    mucs("status", f"run={run}")
    lines = capsys.readouterr().out.splitlines()
    for name in shared:
        (line,) = [line for line in lines if line.startswith(name)]
        assert "done" in line and "KiB" in line
    assert not any(line.split()[:1] in (["score/_features"], ["score/_noise_errors"]) for line in lines)
    mucs("status", f"run={run}", "clean=true")
    assert not stored(run)
    (folder,) = variants(run)
    shutil.rmtree(folder)
    assert torch.equal(score(run, "das", *QUICK), first)


def test_free_memory_is_read_from_the_machine_and_its_container(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable: 40 kB\n")
    assert free_of_machine(tmp_path / "meminfo") == 40 * 1024
    assert free_of_machine(tmp_path / "nothing") is None
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("2000\n")
    assert free_of_container(tmp_path) == 3000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_of_container(tmp_path) is None
