"""``plan=true`` on a slice of the digits: what it counts, what it leaves alone, where it says that it cannot tell."""

import re
from pathlib import Path

import pytest
from commands import fails, mucs

from mucs_cli.attribution.unlearning import UnlearningSettings, UnlearningStep
from mucs_cli.cli import main
from mucs_cli.diffusion.training import Trainer
from mucs_cli.rehearsal import StagePlan
from mucs_cli.stages import engine, plan
from mucs_cli.stages.mirrored import MirroredUnlearner
from mucs_cli.stages.plan import rows_of, seconds_text

NUM_IMAGES, NUM_QUERIES, NUM_DRAWS, NUM_STEPS = 90, 3, 5, 40
TRAIN = [
    "experiment=digits",
    "device=cpu",
    f"data.limit={NUM_IMAGES}",
    f"training.num_steps={NUM_STEPS}",
    "training.batch_size=32",
    "training.warmup_steps=5",
]
SAMPLE = ["sampler.num_steps=4", f"queries.num={NUM_QUERIES}"]
UNLEARN = [
    "unlearning.max_steps=4",
    "unlearning.tolerance=1.0",
    "unlearning.retain_batch_size=16",
    "unlearning.forget_batch_size=16",
]
SCORE = [*UNLEARN, f"noise_bank.num_draws={NUM_DRAWS}", "score.batch_size=32"]
COMMANDS = {"train": TRAIN, "sample": SAMPLE, "unlearn": UNLEARN, "score": SCORE}
LOOPS = {
    "train": ("steps", NUM_STEPS),
    "sample": ("images", NUM_QUERIES),
    "unlearn": ("queries", NUM_QUERIES),
    "score": ("evaluations", NUM_IMAGES * NUM_DRAWS * NUM_QUERIES),
}


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[StagePlan]:
    """What the last command with plan=true found; the first is what starting took."""
    found: list[StagePlan] = []

    def print_plan(context: object, plans: list[StagePlan]) -> None:
        found[:] = plans

    monkeypatch.setattr(plan, "print_plan", print_plan)
    return found


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every loop that may be left is left after its first step."""
    for module in ("fitting", "generation", "blocks", "fisher_store"):
        monkeypatch.setattr(f"mucs_cli.stages.{module}.REHEARSED_SECONDS", 0.0)
    monkeypatch.setattr("mucs_cli.stages.unlearn.LONG_REHEARSAL", 0.0)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def interrupt_after(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, calls: int) -> None:
    """Ctrl-C at the call after so many."""
    whole, seen = getattr(owner, name), []

    def counted(*arguments: object, **keywords: object) -> object:
        seen.append(1)
        if len(seen) > calls:
            raise KeyboardInterrupt
        return whole(*arguments, **keywords)

    monkeypatch.setattr(owner, name, counted)


@pytest.mark.usefixtures("cut")
def test_each_stage_is_counted_and_sized_and_nothing_is_written(tmp_path: Path, planned: list[StagePlan]) -> None:
    run = tmp_path / "digits"
    run.mkdir()
    for command, keys in COMMANDS.items():
        before = contents(tmp_path)
        mucs(command, f"run={run}", *keys, "plan=true")
        assert contents(tmp_path) == before
        assert list(tmp_path.iterdir()) == [run]
        start, stage = planned
        loop = stage.loops[-1]
        assert (loop.unit, loop.total, loop.finished) == (*LOOPS[command], 0)
        assert stage.is_cut
        assert stage.is_known
        assert stage.memory is not None
        assert stage.memory > 50 * 2**20  # torch alone
        assert start.seconds > 0
        mucs(command, f"run={run}", *keys)
        written = sum(map(len, contents(run).values())) - sum(map(len, before.values()))
        assert stage.disk == pytest.approx(written, rel=0.02, abs=16_000)  # pictures and texts differ
        mucs(command, f"run={run}", *keys, "plan=true")
        assert (planned[-1].loops, planned[-1].disk) == ([], 0)
    assert planned[-1].stage == "score"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and queries; tests leave them as they are."""
    run = tmp_path_factory.mktemp("runs") / "digits"
    mucs("run", f"run={run}", *TRAIN, *SAMPLE, "stages=[train,sample]")
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it to do things to."""
    for name, content in contents(finished).items():
        (tmp_path / "digits" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "digits" / name).write_bytes(content)
    return tmp_path / "digits"


@pytest.mark.usefixtures("cut")
def test_finished_steps_are_subtracted(
    tmp_path: Path, planned: list[StagePlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [f"run={tmp_path / 'digits'}", *TRAIN, "checkpoint.every_seconds=1e-6"]
    with monkeypatch.context() as patch:
        interrupt_after(patch, Trainer, "update", 25)
        assert main(["train", *keys]) == 130
    before = contents(tmp_path)
    mucs("train", *keys, "plan=true")
    assert (planned[-1].loops[0].total, planned[-1].loops[0].finished) == (NUM_STEPS, 25)
    assert contents(tmp_path) == before


@pytest.mark.usefixtures("cut")
def test_finished_queries_and_blocks_are_subtracted_and_left_alone(
    run: Path, planned: list[StagePlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    mucs("unlearn", f"run={run}", *UNLEARN, "queries.index=[0,2]")
    mucs("unlearn", f"run={run}", *UNLEARN, "plan=true")
    assert [(loop.total, loop.finished) for loop in planned[-1].loops] == [(NUM_QUERIES, 2)]
    mucs("unlearn", f"run={run}", *UNLEARN)
    with monkeypatch.context() as patch:
        interrupt_after(patch, engine, "bank_losses", 4)  # three blocks of the base model, one of the queries
        assert main(["score", f"run={run}", *SCORE]) == 130
    before = contents(run)
    mucs("score", f"run={run}", *SCORE, "plan=true")
    assert contents(run) == before
    (loop,) = planned[-1].loops  # the base model's losses are there
    assert (loop.total, loop.finished) == (NUM_IMAGES * NUM_DRAWS * NUM_QUERIES, 32 * NUM_DRAWS * NUM_QUERIES)
    mucs("score", f"run={run}", *SCORE)


@pytest.mark.parametrize(
    ("method", "keys", "units"),
    [
        ("trak", ["method.num_draws=2", "method.num_projections=64"], ["gradients", "scores"]),
        ("das", ["method.num_draws=2", "method.num_projections=64"], ["gradients", "evaluations", "scores"]),
        ("pixel", [], ["scores"]),
    ],
)
@pytest.mark.usefixtures("cut")
def test_a_method_without_a_word_of_its_own_on_plans_is_counted(
    run: Path, planned: list[StagePlan], method: str, keys: list[str], units: list[str]
) -> None:
    mucs("score", f"run={run}", f"method={method}", *keys, "plan=true")
    stage = planned[-1]
    assert [loop.unit for loop in stage.loops] == units
    per_image = {"gradients": 2, "evaluations": 2, "scores": NUM_QUERIES}
    assert [loop.total for loop in stage.loops] == [NUM_IMAGES * per_image[unit] for unit in units]
    assert stage.is_known


@pytest.mark.usefixtures("cut")
def test_a_run_from_nothing_is_planned_to_its_end_with_a_bound_on_unlearning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "digits"
    run.mkdir()
    keys = [*TRAIN, *SAMPLE, f"noise_bank.num_draws={NUM_DRAWS}", "unlearning.max_steps=7", "report.k=3"]
    capsys.readouterr()
    mucs("run", f"run={run}", *keys, "plan=true")
    out = capsys.readouterr().out
    assert contents(tmp_path) == {}
    stages = [line.split()[0] for line in out.splitlines() if line.strip()]
    assert [stage for stage in dict.fromkeys(stages) if stage in {*COMMANDS, "report", "total"}] == [
        *COMMANDS,
        "report",
        "total",
    ]
    assert re.search(rf"score +score, evaluations +{NUM_IMAGES * NUM_DRAWS * NUM_QUERIES} +0 ", out)
    assert "unlearn: at most: 7 updates a query. Run stages=[train,sample] first to know better" in out
    mucs("run", f"run={run}", *keys, "plan=true", "stages=[train,sample,evaluate]")
    out = capsys.readouterr().out
    assert "evaluate: cannot be predicted yet. Run stages=[train,sample] first" in out
    assert "+ ?" in out


def test_what_a_command_refuses_its_plan_refuses_in_the_same_words(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command, *keys in (
        ("score", f"run={run}"),
        ("unlearn", f"run={run}", "queries.index=7"),
        ("sample", f"run={run}", "sampler.num_steps=9"),
        ("train", f"run={run}", "training.num_steps=77"),
        ("train", f"run={tmp_path / 'other'}", "data=image_folder", f"data.path={tmp_path / 'nothing'}"),
        ("run", f"run={run}", "report.k=91"),
    ):
        line = fails(capsys, command, *keys)
        assert fails(capsys, command, *keys, "plan=true") == line
        assert ".mucs-plan-" not in line


def test_how_far_unlearning_is_follows_from_its_updates_or_the_way_to_its_bound() -> None:
    unlearner = object.__new__(MirroredUnlearner)
    unlearner.settings = UnlearningSettings(null_loss=1.0, learning_rate=1.0, num_steps=8)
    assert unlearner.share_done(UnlearningStep(1, 0.0, 0.9)) == 0.25
    unlearner.settings = UnlearningSettings(null_loss=1.0, learning_rate=1.0, tolerance=0.9, max_steps=99)
    assert unlearner.share_done(UnlearningStep(0, 0.0, 0.2)) == 0.01  # one of 100 losses, the gap is as at the start
    assert unlearner.share_done(UnlearningStep(1, 0.0, 0.6)) == pytest.approx(1 / 3)  # halved, of three times
    assert unlearner.share_done(UnlearningStep(2, 0.0, 0.8)) == pytest.approx(2 / 3)
    assert unlearner.share_done(UnlearningStep(74, 0.0, 0.3)) == 0.75
    assert unlearner.share_done(UnlearningStep(75, 0.0, 0.95)) == 1.0
    unlearner.settings = UnlearningSettings(null_loss=1.0, learning_rate=1.0, tolerance=1.0, max_steps=99)
    assert unlearner.share_done(UnlearningStep(49, 0.0, 0.9)) == 0.5  # a bound that the loss need not ever meet


def test_times_are_read_as_people_say_them_and_an_unknown_one_is_none() -> None:
    assert [seconds_text(value) for value in (None, 0.04, 59.0, 185.2, 7799.0)] == [
        "?",
        "0.0 s",
        "59.0 s",
        "3 min 5 s",
        "2 h 9 min",
    ]
    total = rows_of([StagePlan("train", other_seconds=70.0, memory=2**20), StagePlan("evaluate")])[-1]
    assert total == ("total", "", None, None, None, "1 min 10 s + ?", "1.0 MiB", "0 B")
