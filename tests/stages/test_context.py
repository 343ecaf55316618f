"""What an existing run contributes to a later command, and what the command line may change."""

import json
from pathlib import Path
from typing import Any

import pytest

from mucs_cli.artifacts import write_record
from mucs_cli.composition import compose
from mucs_cli.config import TRAIN_SECTIONS
from mucs_cli.errors import UserError
from mucs_cli.records import read_json
from mucs_cli.stages.context import MAX_VARIANT_NAME, Context, spell, variant_name

SMALL = ("run=r", "experiment=digits", "training.num_steps=5")


def create(folder: Path, command: str, *overrides: str, cwd: Path | None = None) -> Context:
    return Context.create(command, compose(command, list(overrides)), list(overrides), cwd or folder)


def finish(context: Context, name: str, sections: tuple[str, ...]) -> None:
    """A finished stage without results: its manifest is what counts here."""
    stage = context.stage(context.folder(name), name, sections)
    assert not stage.is_done()
    stage.begin()
    stage.finish({}, [])


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A folder with a run ``r`` whose training and sampling are done."""
    finish(create(tmp_path, "train", *SMALL, "seed=3"), "train", TRAIN_SECTIONS)
    finish(create(tmp_path, "sample", "run=r", "queries.num=4"), "sample", ("sampler", "queries"))
    return tmp_path


def test_a_later_command_has_the_runs_values_not_the_defaults(made: Path) -> None:
    config = create(made, "unlearn", "run=r").config
    assert (config.model.size, config.training.num_steps, config.queries.num) == ("tiny", 5, 4)
    assert (config.seed, config.unlearning.seed, config.training.seed) == (3, 3, 3)


def test_typed_values_apply_to_an_existing_run(made: Path) -> None:
    context = create(made, "score", "run=r", "unlearning.forget_weight=0.5", "score={batch_size:32}")
    assert context.config.unlearning.forget_weight == 0.5
    assert context.config.score.batch_size == 32


def test_device_and_overwrite_are_not_kept(tmp_path: Path) -> None:
    context = create(tmp_path, "train", *SMALL, "device=cpu", "overwrite=true")
    finish(context, "train", TRAIN_SECTIONS)
    later = create(tmp_path, "unlearn", "run=r").config
    assert (later.device, later.overwrite) == ("auto", False)


def test_a_variant_typed_on_the_first_command_is_no_part_of_the_run(tmp_path: Path) -> None:
    context = create(tmp_path, "run", *SMALL, "unlearning.forget_weight=0.5", "noise_bank.seed=9")
    finish(context, "train", TRAIN_SECTIONS)
    assert context.unlearn_variant() == "mucs__forget_weight-0.5"
    assert context.score_variant() == "mucs__forget_weight-0.5__noise_bank.seed-9"
    stored = read_json(tmp_path / "r" / "run.json")
    assert stored["config"]["unlearning"]["forget_weight"] == 0.2
    assert stored["config"]["unlearning"]["seed"] == "${seed}"
    assert stored["config"]["training"]["num_steps"] == 5
    assert create(tmp_path, "unlearn", "run=r").unlearn_variant() == "mucs"


def test_a_value_equal_to_the_runs_own_names_no_variant(made: Path) -> None:
    assert create(made, "unlearn", "run=r", "unlearning.forget_weight=0.2").unlearn_variant() == "mucs"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.holdout=100", "data.holdout: got 100; {run}/train/manifest.json has 0."),
        ("training.num_steps=6", "training.num_steps: got 6; {run}/train/manifest.json has 5."),
        ("queries.num=5", "queries.num: got 5; {run}/sample/manifest.json has 4."),
        ("model=unet", "model.name: got 'unet'; {run}/train/manifest.json has 'dit'."),
    ],
)
def test_a_typed_value_that_a_finished_stage_contradicts_is_refused(made: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        create(made, "unlearn", "run=r", override)
    assert str(caught.value).startswith(message.format(run=made / "r"))
    stage = "sample" if override.startswith("queries") else "train"
    assert str(caught.value).endswith(f"mucs {stage} run={made / 'r'} {override} overwrite=true")


def test_typing_the_finished_value_again_is_fine(made: Path) -> None:
    assert (
        create(
            made,
            "unlearn",
            "run=r",
            "training.num_steps=5",
            "model=dit",
            "model.size=tiny",
            "model.conditional=true",
            "model.dropout=0",
        ).config.training.num_steps
        == 5
    )


def test_the_owning_command_is_judged_by_its_own_manifest(made: Path) -> None:
    context = create(made, "train", "run=r", "training.num_steps=6")
    with pytest.raises(UserError, match=r"training\.num_steps: got 6; .* has 5"):
        context.stage(context.folder("train"), "train", TRAIN_SECTIONS).is_done()
    assert read_json(made / "r" / "run.json")["config"]["training"]["num_steps"] == 5


def test_redoing_a_stage_changes_what_the_run_is(made: Path) -> None:
    context = create(made, "train", "run=r", "training.num_steps=6", "seed=4", "overwrite=true")
    finish(context, "train", TRAIN_SECTIONS)
    later = create(made, "unlearn", "run=r")
    assert (later.config.training.num_steps, later.config.seed, later.config.unlearning.seed) == (6, 4, 4)
    assert later.unlearn_variant() == "mucs"


def test_an_experiment_typed_later_sets_everything_but_what_is_finished(made: Path) -> None:
    config = create(made, "unlearn", "run=r", "experiment=digits", "unlearning.max_steps=7").config
    assert (config.training.num_steps, config.queries.num, config.unlearning.max_steps) == (5, 4, 7)


def test_a_stage_of_run_that_is_not_listed_counts_as_finished(made: Path) -> None:
    with pytest.raises(UserError, match=r"training\.num_steps: got 6"):
        create(made, "run", "run=r", "training.num_steps=6", "stages=[unlearn,score]")
    assert create(made, "run", "run=r", "stages=[unlearn,score]").config.training.num_steps == 5


def test_a_run_that_was_never_made_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        create(tmp_path, "score", "run=nowhere")
    path = tmp_path / "nowhere"
    assert str(caught.value).startswith(f"{path / 'run.json'}: not found;")
    assert str(caught.value).endswith(f"mucs train run={path}")
    assert not path.exists()


def test_relative_paths_start_where_the_command_was_typed(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    context = create(first, "train", "run=r", "data=image_folder", "data.path=pictures")
    assert (context.run, context.config.data.path) == (first / "r", str(first / "pictures"))
    finish(context, "train", ())
    assert create(second, "unlearn", f"run={first / 'r'}").config.data.path == str(first / "pictures")


def test_a_name_on_a_hub_is_no_path(tmp_path: Path) -> None:
    overrides = ("run=r", "data=huggingface", "data.path=owner/pictures")
    assert create(tmp_path, "train", *overrides).config.data.path == "owner/pictures"
    (tmp_path / "owner" / "pictures").mkdir(parents=True)
    assert create(tmp_path, "train", *overrides).config.data.path == str(tmp_path / "owner" / "pictures")


def test_run_json_is_written_by_the_first_stage_only(tmp_path: Path) -> None:
    context = create(tmp_path, "train", *SMALL)
    assert not (tmp_path / "r" / "run.json").exists()
    context.stage(context.folder("train"), "train", TRAIN_SECTIONS).begin()
    assert read_json(tmp_path / "r" / "run.json")["config"]["model"]["size"] == "tiny"


def test_a_run_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=rf"run: got {tmp_path}/file/r, which cannot be created \(.*\)"):
        create(tmp_path, "train", "run=file/r", "experiment=digits")


@pytest.mark.parametrize(
    ("text", "message"), [("{", "cannot be read as JSON"), ("[]", "got no JSON object"), ("{}", "got no configuration")]
)
def test_a_damaged_run_json_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "run.json").write_text(text)
    with pytest.raises(UserError, match=message):
        create(tmp_path, "unlearn", "run=r")


def test_a_run_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "run.json").write_text(json.dumps({"format_version": 99, "config": {}}))
    with pytest.raises(UserError, match="got file format 99"):
        create(tmp_path, "unlearn", "run=r")


# --- names of variants -----------------------------------------------------------------------------------------------

BASE: dict[str, dict[str, Any]] = {
    "method": {"name": "mucs", "epsilon": 1e-3},
    "unlearning": {"forget_weight": 0.2, "patterns": [], "num_steps": None, "seed": 0},
    "noise_bank": {"num_draws": 100, "seed": 0},
}


def name_of(**changed: dict[str, Any]) -> str:
    return variant_name("mucs", {section: BASE[section] | changed.get(section, {}) for section in BASE}, BASE)


def test_variant_names_list_what_differs_sorted() -> None:
    assert name_of() == "mucs"
    assert name_of(unlearning={"num_steps": 3, "forget_weight": 1.0}) == "mucs__forget_weight-1__num_steps-3"
    assert name_of(unlearning={"seed": 1}) == "mucs__unlearning.seed-1"
    assert name_of(method={"epsilon": 1e-05}) == "mucs__epsilon-1e-05"


def test_variant_names_are_file_names_and_differ_where_values_do() -> None:
    names = {name_of(unlearning={"patterns": [text]}) for text in ("a*", "a?", "a/b", "a b", "a,b", "a=b")}
    assert len(names) == 6
    for name in names:
        assert not set(name) & set("/=, *?")


def test_long_variant_names_are_cut_without_becoming_equal() -> None:
    first, second = (name_of(unlearning={"patterns": ["block" * 30, last]}) for last in ("a", "b"))
    assert first != second
    assert len(first) == len(second) == MAX_VARIANT_NAME


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.5, "0.5"), (2.0, "2"), (None, "null"), (True, "true"), ([1, 2], "1+2"), ([], "none"), ("exact", "exact")],
)
def test_values_are_spelled_readably(value: Any, text: str) -> None:
    assert spell(value) == text


def test_what_a_run_of_an_earlier_version_lacks_is_as_by_default_and_what_is_typed_names_a_variant(made: Path) -> None:
    path = made / "r" / "run.json"
    record = read_json(path)
    del record["config"]["speed"], record["config"]["score"]["mode"], record["config"]["score"]["top_k"]
    write_record(path, record)
    assert create(made, "score", "run=r").config.score.mode == "exact"
    fast = create(made, "score", "run=r", "speed=fast", "score.top_k=7")
    assert (fast.config.score.mode, fast.config.score.top_k) == ("adaptive", 7)
    assert fast.score_variant() == "mucs__mode-adaptive__top_k-7"


def test_a_run_that_was_made_fast_stays_fast(tmp_path: Path) -> None:
    finish(create(tmp_path, "run", *SMALL, "speed=fast"), "train", TRAIN_SECTIONS)
    later = create(tmp_path, "score", "run=r")
    assert later.races
    assert later.score_variant() == "mucs__mode-adaptive"
    assert create(tmp_path, "score", "run=r", "speed=faithful").score_variant() == "mucs"
    assert not create(tmp_path, "score", "run=r", "method=pixel").races


def test_a_key_that_an_earlier_version_recorded_under_another_name_keeps_its_value(made: Path) -> None:
    path = made / "r" / "run.json"
    record = read_json(path)
    del record["config"]["checkpoint"]
    record["config"]["training"]["checkpoint_every_seconds"] = 7.0
    write_record(path, record)
    assert create(made, "sample", "run=r").config.checkpoint.every_seconds == 7.0
    assert create(made, "train", "run=r", "checkpoint.every_seconds=3").config.checkpoint.every_seconds == 3.0
