"""A command that was killed, or interrupted, anywhere, typed again: the same bits, and hardly anything done twice."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from commands import fails, mucs
from interrupted import Killed, assert_same_files, calls_of, stop, stop_after
from safetensors.torch import load_file, save_file

from mucs_cli import artifacts, locks
from mucs_cli.attribution import unlearning
from mucs_cli.block_file import BlockFile
from mucs_cli.diffusion.training import Trainer
from mucs_cli.stage_folder import Stage
from mucs_cli.stages import engine
from mucs_cli.stages.checkpoints import read_checkpoint, write_checkpoint
from mucs_cli.stages.query_records import QueryRecords

NUM_QUERIES, NUM_STEPS = 3, 40
TRAIN = [
    "experiment=digits",
    "device=cpu",
    "data.limit=64",
    "data.holdout=16",
    f"training.num_steps={NUM_STEPS}",
    "training.batch_size=16",
    "training.warmup_steps=5",
    "training.validate_every=10",
]
SAMPLE = ["sampler.num_steps=2", f"queries.num={NUM_QUERIES}"]
SMALL = ["unlearning.max_steps=8", "unlearning.retain_batch_size=8", "unlearning.forget_batch_size=8"]
UNLEARN = [*SMALL, "unlearning.null_loss=50"]  # which no query reaches
STACK = [
    *SMALL,
    "unlearning.stack_size=2",
    "unlearning.learning_rate=0.02",
    "unlearning.forget_weight=3",
    "unlearning.null_loss=3",
    "unlearning.tolerance=0.85",
]
SCORE = [*UNLEARN, "noise_bank.num_draws=4", "score.batch_size=16"]
OFTEN = "checkpoint.every_seconds=1e-9"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All stages, never interrupted; no test changes it."""
    run = tmp_path_factory.mktemp("runs") / "digits"
    mucs("run", f"run={run}", *TRAIN, *SAMPLE, *SCORE, "stages=[train,sample,unlearn,score]")
    mucs("unlearn", f"run={run}", *STACK)
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "digits"))


def folder_of(run: Path, stack: bool = False) -> Path:
    (found,) = [path for path in (run / "unlearn").iterdir() if ("forget_weight" in path.name) is stack]
    return found


# --- training --------------------------------------------------------------------------------------------------------


def test_an_interrupted_training_loses_no_step(run: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(run)
    with monkeypatch.context() as patched:
        stop_after(patched, Trainer, "update", 27, KeyboardInterrupt)
        stop(KeyboardInterrupt, "train", f"run={run}", *TRAIN)  # with the default checkpoint.every_seconds
    (saved,) = (run / "train" / "checkpoint").iterdir()
    assert saved.name == "step_000000027.safetensors"
    updates = calls_of(monkeypatch, Trainer, "update")
    mucs("train", f"run={run}", *TRAIN)
    assert len(updates) == NUM_STEPS - 27
    assert_same_files(run, finished, "train")


def test_a_training_that_is_killed_again_and_again_ends_with_the_same_bits(
    run: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(run)
    for _ in range(3):
        with monkeypatch.context() as patched:
            stop_after(patched, Trainer, "update", 11, Killed)
            stop(Killed, "train", f"run={run}", *TRAIN, OFTEN)
    updates = calls_of(monkeypatch, Trainer, "update")
    mucs("train", f"run={run}", *TRAIN)
    assert len(updates) == NUM_STEPS - 33
    assert_same_files(run, finished, "train")


def test_the_last_two_states_stay_and_what_cannot_be_read_gives_way(tmp_path: Path) -> None:
    state = load_file  # the files are plain safetensors
    for step in (5, 10, 15):
        write_checkpoint(tmp_path, step, {"step": artifacts.torch.tensor(step)})
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "step_000000010.safetensors",
        "step_000000015.safetensors",
    ]
    assert int(state(tmp_path / "step_000000015.safetensors")["step"]) == 15
    (tmp_path / "step_000000015.safetensors").write_bytes(b"cut short")
    (tmp_path / ".step_000000016.safetensors.1.tmp").write_bytes(b"of a process that was killed")
    assert int(read_checkpoint(tmp_path)["step"]) == 10
    write_checkpoint(tmp_path, 12, {"step": artifacts.torch.tensor(12)})
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "step_000000010.safetensors",
        "step_000000012.safetensors",
    ]
    assert read_checkpoint(tmp_path / "missing") == {}


# --- unlearning ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("error", "key"), [(Killed, OFTEN), (KeyboardInterrupt, "checkpoint.every_seconds=60")])
@pytest.mark.parametrize("steps", [5, 12, 18])  # a query takes eight, and one more batch for the stop rule
def test_unlearning_goes_on_within_a_query(
    steps: int, error: type[BaseException], key: str, run: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(run / "unlearn")
    with monkeypatch.context() as patched:
        stop_after(patched, unlearning, "_accumulate_gradient", steps, error)
        stop(error, "unlearn", f"run={run}", *UNLEARN, key)
    places = list((folder_of(run) / "checkpoint").iterdir())
    assert [path.name for path in places] == ([f"query_{steps // 9:04d}"] if steps % 9 or error is not Killed else [])
    batches = calls_of(monkeypatch, unlearning, "_accumulate_gradient")
    mucs("unlearn", f"run={run}", *UNLEARN)
    assert len(batches) == 9 * NUM_QUERIES - steps
    assert not (folder_of(run) / "checkpoint").exists()
    assert_same_files(run, finished, f"unlearn/{folder_of(finished).name}")


@pytest.mark.parametrize(("error", "key"), [(Killed, OFTEN), (KeyboardInterrupt, "checkpoint.every_seconds=60")])
def test_stacked_queries_go_on_wherever_they_were_stopped(
    error: type[BaseException], key: str, run: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        batches = calls_of(patched, unlearning, "_accumulate_gradient")
        shutil.rmtree(folder_of(run, stack=True))
        mucs("unlearn", f"run={run}", *STACK)
    results = json.loads((folder_of(run, stack=True) / "manifest.json").read_text())["results"]
    assert results[0]["num_steps"] != results[1]["num_steps"]  # one leaves the stack before the other
    for steps in range(1, len(batches), 3):
        shutil.rmtree(folder_of(run, stack=True))
        with monkeypatch.context() as patched:
            stop_after(patched, unlearning, "_accumulate_gradient", steps, error)
            stop(error, "unlearn", f"run={run}", *STACK, key)
        with monkeypatch.context() as patched:
            again = calls_of(patched, unlearning, "_accumulate_gradient")
            mucs("unlearn", f"run={run}", *STACK)
        assert len(again) <= len(batches) - steps + 1  # the batch at which one of a stack stops counts twice
        assert_same_files(run, finished, f"unlearn/{folder_of(finished, stack=True).name}")


def test_a_kill_between_the_files_of_a_query_of_a_stack_loses_nothing(
    run: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for calls in range(NUM_QUERIES):
        shutil.rmtree(folder_of(run, stack=True))
        with monkeypatch.context() as patched:
            stop_after(patched, QueryRecords, "write", calls, Killed)
            stop(Killed, "unlearn", f"run={run}", *STACK)
        mucs("unlearn", f"run={run}", *STACK)
        assert_same_files(run, finished, f"unlearn/{folder_of(finished, stack=True).name}")


def test_a_kill_after_the_first_of_a_stack_that_stops_all_at_once_loses_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*STACK[:3], "unlearning.stack_size=3", "unlearning.num_steps=3"]
    shutil.rmtree(run / "unlearn")
    whole = Path(shutil.copytree(run, tmp_path / "whole"))
    mucs("unlearn", f"run={whole}", *command)
    with monkeypatch.context() as patched:
        stop_after(patched, QueryRecords, "write", 1, Killed)
        stop(Killed, "unlearn", f"run={run}", *command)
    mucs("unlearn", f"run={run}", *command)
    assert_same_files(run, whole, "unlearn")


def test_a_model_that_is_damaged_while_queries_are_added_is_not_taken_for_sound(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mucs("sample", f"run={run}", "queries.num=4")
    path = folder_of(run) / "query_0001.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    mucs("unlearn", f"run={run}", *UNLEARN)
    line = fails(capsys, "score", f"run={run}", *SCORE, "noise_bank.num_draws=3")
    assert f"{path}: is not the file its manifest names (SHA-256 differs). Delete it and run mucs unlearn" in line
    path.unlink()
    mucs("unlearn", f"run={run}", *UNLEARN)
    assert path.read_bytes() == content


def test_a_model_that_is_damaged_before_its_stage_is_done_is_not_taken_for_sound(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run / "unlearn")
    with monkeypatch.context() as patched:
        stop_after(patched, QueryRecords, "write", 2, Killed)
        stop(Killed, "unlearn", f"run={run}", *UNLEARN)
    for query, size in ((0, 0), (1, 1)):
        path = folder_of(run) / f"query_{query:04d}.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"~" * size)
    mucs("unlearn", f"run={run}", *UNLEARN)  # does the one again whose size is wrong
    line = fails(capsys, "score", f"run={run}", *SCORE, "noise_bank.num_draws=3")
    assert "query_0001.safetensors: is not the file its manifest names" in line


def test_other_stack_sizes_do_not_go_on_from_a_stack_that_is_too_large(
    run: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(run / "unlearn")
    with monkeypatch.context() as patched:
        stop_after(patched, unlearning, "_accumulate_gradient", 3, Killed)
        stop(Killed, "unlearn", f"run={run}", *UNLEARN, "unlearning.stack_size=3", OFTEN)
    mucs("unlearn", f"run={run}", *UNLEARN, "unlearning.stack_size=1")
    assert_same_files(run, finished, f"unlearn/{folder_of(finished).name}")


# --- scoring, and files that belong together -------------------------------------------------------------------------


def test_losses_that_were_put_in_place_just_before_a_kill_are_not_computed_again(
    run: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(run / "score")
    with monkeypatch.context() as patched:
        stop_after(patched, Stage, "finish", 0, Killed)
        stop(Killed, "score", f"run={run}", *SCORE)
    (losses,) = (run / "score" / "_base").glob("*/losses.safetensors")
    assert not (losses.parent / "manifest.json").exists()
    passes = calls_of(monkeypatch, engine, "bank_losses")
    with monkeypatch.context() as patched:
        stop_after(patched, Stage, "finish", 1, Killed)
        stop(Killed, "score", f"run={run}", *SCORE)
    assert len(passes) == 3  # blocks of the queries; none of the base model
    mucs("score", f"run={run}", *SCORE)
    assert len(passes) == 3
    assert_same_files(run, finished, "score")
    assert not list((run / "score").rglob("*.journal"))


def test_scoring_goes_on_with_other_passes(run: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(run / "score")
    with monkeypatch.context() as patched:
        stop_after(patched, engine.Engine, "losses", 7, Killed)  # in the second query's pass
        stop(Killed, "score", f"run={run}", *SCORE, "score.memory_budget=1e-6")
    mucs("score", f"run={run}", *SCORE)
    assert_same_files(run, finished, "score")


@pytest.mark.parametrize(
    ("keys", "calls"),
    [([], 4), (["noise_bank.num_draws=12", "score.mode=adaptive", "score.top_k=2"], 1)],
    ids=["exact", "race"],
)
def test_a_bit_that_flips_in_a_file_in_the_making_is_computed_again(
    keys: list[str], calls: int, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [f"run={run}", *SCORE, *keys]
    shutil.rmtree(run / "score")
    mucs("score", *command)
    whole = Path(shutil.copytree(run, run.with_name("whole")))
    shutil.rmtree(run / "score")
    with monkeypatch.context() as patched:
        stop_after(patched, BlockFile, "commit", calls, Killed)
        stop(Killed, "score", *command)
    (begun,) = (run / "score").rglob("*.partial")
    content = bytearray(begun.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    place = next(place for place in range(header, len(content)) if content[place])  # in the first block that is done
    content[place] ^= 1
    begun.write_bytes(content)
    mucs("score", *command)
    assert_same_files(run, whole, "score")


def test_what_a_kill_just_after_the_manifest_has_left_is_deleted(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for command, keys in (("unlearn", UNLEARN), ("score", [*SCORE, "score.mode=adaptive", "score.top_k=2"])):
        shutil.rmtree(run / command)
        with monkeypatch.context() as patched:
            patched.setattr(Stage, "_tidy", lambda stage, manifest: stop_here(stage.folder))
            stop(Killed, command, f"run={run}", *keys)
        locks.release_all()
        (folder,) = (path.parent for path in (run / command).glob("mucs*/manifest.json"))
        left = {path.name for path in folder.iterdir()}
        assert left >= {"state.json", "done" if command == "unlearn" else "races"}
        mucs(command, f"run={run}", *keys)
        for name in ("state.json", "done", "races", "checkpoint"):
            assert not (folder / name).exists()


def stop_here(folder: Path) -> None:
    """What takes the place of ``Stage._tidy``: a kill, but for folders that variants share."""
    if not folder.parent.name.startswith("_"):
        raise Killed


# --- files of another form, though their hashes are right ------------------------------------------------------------


def forge(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, path)
    manifest = json.loads((path.parent / "manifest.json").read_text())
    manifest["outputs"][path.name] = artifacts.entry_of(path)
    artifacts.write_record(path.parent / "manifest.json", manifest)


def test_forged_tensors_are_refused_in_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (scores,) = (run / "score").glob("mucs*/scores.safetensors")
    whole = load_file(scores)
    for changed in ({"score": whole["score"].double()}, {"score": whole["score"][:, 1:].contiguous()}):
        forge(scores, whole | changed)
        assert f"{scores}: got float" in fails(capsys, "score", f"run={run}", *SCORE)
    for name in ("query_id", "example_id"):
        twice = whole[name].clone()
        twice[1] = twice[0]
        forge(scores, whole | {name: twice})
        for command in (["report"], ["evaluate", "evaluation=overlap"], ["show"]):
            assert f"{scores}: got {name} that do not ascend" in fails(capsys, command[0], f"run={run}", *command[1:])
    forge(scores, {name: tensor for name, tensor in whole.items() if name != "query_id"})
    assert "expected a safetensors file with 'query_id'" in fails(capsys, "score", f"run={run}", *SCORE)
    model = folder_of(run) / "query_0000.safetensors"
    found = load_file(model)
    name = next(iter(found))
    for changed in ({"other": found[name].clone()}, {name: found[name].T.contiguous()}, {name: found[name].double()}):
        forge(model, found | changed)
        shutil.rmtree(scores.parent)
        assert "which the base model has not" in fails(capsys, "score", f"run={run}", *SCORE)


def test_forged_facts_about_queries_are_refused_when_others_are_added(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = folder_of(run) / "manifest.json"
    mucs("sample", f"run={run}", "queries.num=4")
    record = json.loads(manifest.read_text())
    for forged in ("a lot", None):
        results = [{**entry, "num_steps": forged} for entry in record["results"]]
        artifacts.write_record(manifest, record | {"results": results})
        assert "got results of another form" in fails(capsys, "unlearn", f"run={run}", *UNLEARN)
    artifacts.write_record(manifest, record)
    mucs("unlearn", f"run={run}", *UNLEARN)
    (scores,) = (run / "score").glob("mucs*/scores.safetensors")
    found = load_file(scores)
    one = {name: found[name][..., :1].contiguous() for name in ("score", "example_id")}
    forge(scores, found | one)
    assert f"{scores}: got float32 [3, 1] for 'score'" in fails(capsys, "score", f"run={run}", *SCORE)


def test_queries_that_are_no_pictures_are_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "sample" / "samples.safetensors"
    found = load_file(path)
    forge(path, found | {"image": found["image"] * float("nan")})
    for command in (["report"], ["unlearn", "overwrite=true"]):
        assert f"{path}: got values for 'image' that are not finite" in fails(
            capsys, command[0], f"run={run}", *command[1:]
        )


def test_queries_without_roles_are_generated_ones(run: Path) -> None:
    path = run / "sample" / "samples.safetensors"
    forge(path, {name: tensor for name, tensor in load_file(path).items() if name != "role"})
    mucs("score", f"run={run}", "method=random")


@pytest.mark.parametrize("command", ["sample", "score"])
def test_a_kill_while_queries_are_added_keeps_those_that_there_were(
    command: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["queries.num=5"]
    mucs("sample", f"run={run}", *more) if command == "score" else None
    mucs("unlearn", f"run={run}", *UNLEARN) if command == "score" else None
    keys = more if command == "sample" else SCORE
    whole = Path(shutil.copytree(run, tmp_path / "whole"))
    mucs(command, f"run={whole}", *keys)
    for _ in range(2):
        with monkeypatch.context() as patched:
            stop_after(patched, Stage, "finish", 0, Killed)  # the file is there, the manifest names the old one
            stop(Killed, command, f"run={run}", *keys)
    mucs(command, f"run={run}", *keys)
    assert_same_files(run, whole, command)
    assert not list((run / command).rglob(".*"))


def test_a_kill_while_a_stage_is_emptied_leaves_it_under_its_old_name(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = ["training.learning_rate=1e-3", "overwrite=true"]
    with monkeypatch.context() as patched:
        stop_after(patched, Path, "unlink", 2, Killed)
        stop(Killed, "train", f"run={run}", *other)
    locks.release_all()  # as the end of a killed process does
    assert "training.learning_rate: got 0.001" in fails(capsys, "train", f"run={run}", other[0])
    mucs("train", f"run={run}", *other)
    assert json.loads((run / "train" / "manifest.json").read_text())["config"]["training"]["learning_rate"] == 1e-3


def test_a_journal_that_was_cut_short_is_gone_on_with(tmp_path: Path) -> None:
    def opened() -> BlockFile:
        return BlockFile(tmp_path / "file.safetensors", {"x": ("float32", (4,))}, "identity")

    def held() -> set[int]:
        file = opened()
        return {block for block in range(4) if file.holds(block, file.arrays["x"][block : block + 1])}

    file = opened()
    for block in (0, 1):
        file.arrays["x"][block] = block + 1
        file.commit(block, file.arrays["x"][block : block + 1])
    size = file.journal.stat().st_size
    os.truncate(file.journal, size - 4)
    assert held() == {0}
    file = opened()
    file.arrays["x"][2] = 3
    file.commit(2, file.arrays["x"][2:3])
    assert held() == {0, 2}
    assert opened().arrays["x"].tolist() == [1, 2, 3, 0]


def test_a_file_of_other_blocks_is_begun_afresh_though_it_lies_in_place(tmp_path: Path) -> None:
    def opened(identity: str) -> BlockFile:
        return BlockFile(tmp_path / "file.safetensors", {"x": ("float32", (4,))}, identity)

    def holds(file: BlockFile) -> bool:
        return file.holds(0, file.arrays["x"])

    file = opened("16 images")
    file.arrays["x"][:] = 7
    file.commit(0, file.arrays["x"])
    file.finish(keep_journal=True)
    assert holds(opened("16 images"))
    assert not (tmp_path / "file.safetensors").exists()
    opened("16 images").finish(keep_journal=True)
    other = opened("32 images")
    assert not holds(other)
    assert other.arrays["x"].tolist() == [0, 0, 0, 0]
    assert not holds(opened("16 images"))  # the journal went before the file did
