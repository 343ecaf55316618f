"""score.mode=adaptive: the survivors' scores are exact mode's, and everything that reads scores knows what they are."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import fails, mucs
from safetensors.numpy import load_file
from unlearning_runs import attribute, make_run, manifest_of

from mucs_cli.attribution.reducers import PER_DRAW
from mucs_cli.cli import main
from mucs_cli.composition import compose
from mucs_cli.config import RACING_REDUCERS
from mucs_cli.stages import races
from mucs_cli.stages.context import Context
from mucs_cli.stages.engine import Engine, prepare_bank
from mucs_cli.stages.growing_losses import GrowingLosses
from mucs_cli.stages.work import Work

K, NUM_DRAWS = 3, 30
UNLEARN = ["unlearning.num_steps=12", "unlearning.learning_rate=1e-3"]
KEYS = [*UNLEARN, f"noise_bank.num_draws={NUM_DRAWS}", "score.batch_size=16"]
RACE = ["score.mode=adaptive", f"score.top_k={K}", "score.confidence=0.9", "score.group_k=3"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one exact variant."""
    run = make_run(tmp_path_factory.mktemp("runs") / "digits")
    attribute(run, *KEYS)
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """Without the exact scores."""
    folder = Path(shutil.copytree(finished, tmp_path / "digits"))
    shutil.rmtree(folder / "score")
    return folder


@pytest.fixture
def few_audited(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 40 images, batches of 16 would leave nothing dropped."""
    monkeypatch.setattr(races, "AUDIT", 2)


def exact_of(finished: Path) -> np.ndarray:
    (folder,) = (path for path in (finished / "score").glob("mucs*"))
    scores: np.ndarray = load_file(folder / "scores.safetensors")["score"]
    return scores


def top(scores: np.ndarray, k: int = K) -> list[int]:
    return np.argsort(-scores, kind="stable")[:k].tolist()


@pytest.mark.usefixtures("few_audited")
@pytest.mark.parametrize("method", [[], ["method.reducer=difference"]])
def test_survivors_have_the_exact_scores_and_the_others_stay_below(
    run: Path, finished: Path, method: list[str]
) -> None:
    exact = exact_of(finished) if not method else exact_of_fresh(run, *method)
    found = load_file(attribute(run, *KEYS, *method, *RACE) / "scores.safetensors")
    assert found["draws"].dtype == np.int32
    for scores, ours, draws in zip(exact, found["score"], found["draws"], strict=True):
        whole = draws == NUM_DRAWS
        assert K <= whole.sum() < len(draws)
        assert set(draws.tolist()) <= {4, 8, 16, NUM_DRAWS}
        np.testing.assert_allclose(ours[whole], scores[whole], rtol=1e-4, atol=1e-6)
        assert top(ours) == top(np.where(whole, scores, -np.inf))
        assert (ours[~whole] < np.sort(ours[whole])[-K]).all()
        assert np.corrcoef(ours, scores)[0, 1] > 0.8  # estimates, not fillers


def exact_of_fresh(run: Path, *keys: str) -> np.ndarray:
    scores: np.ndarray = load_file(attribute(run, *KEYS, *keys) / "scores.safetensors")["score"]
    shutil.rmtree(run / "score")
    return scores


def test_forward_inf_races_as_well(run: Path) -> None:
    keys = ["method=forward_inf", "method.num_steps=2", "noise_bank.num_draws=8", "score.batch_size=16"]
    exact = load_file(attribute(run, *keys) / "scores.safetensors")["score"]
    found = load_file(attribute(run, *keys, *RACE) / "scores.safetensors")
    whole = found["draws"] == 8
    np.testing.assert_allclose(found["score"][whole], exact[whole], rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("few_audited")
def test_base_losses_are_computed_once_for_all_queries_and_variants(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[tuple[int, int]] = []
    whole = Engine.pair_losses

    def counted(self: Engine, rows: np.ndarray, draws: np.ndarray, tensors: object) -> object:
        if not tensors:
            computed.extend(zip(rows.tolist(), draws.tolist(), strict=True))
        return whole(self, rows, draws, tensors)  # type: ignore[arg-type]

    monkeypatch.setattr(Engine, "pair_losses", counted)
    found = load_file(attribute(run, *KEYS, *RACE) / "scores.safetensors")
    assert len(computed) == len(set(computed)) == found["draws"].max(axis=0).sum()
    computed.clear()
    attribute(run, *KEYS, *RACE, "method.epsilon=1e-2")
    assert len(computed) < found["draws"].max(axis=0).sum() / 4  # what only this variant's survivors need


@pytest.mark.usefixtures("few_audited")
def test_scores_do_not_depend_on_what_was_scored_before(run: Path, tmp_path: Path) -> None:
    twin = Path(shutil.copytree(run, tmp_path / "twin"))
    attribute(twin, *KEYS)
    attribute(twin, *KEYS, *RACE, "method.epsilon=1e-2")
    first, second = attribute(run, *KEYS, *RACE), attribute(twin, *KEYS, *RACE)
    assert (first / "scores.safetensors").read_bytes() == (second / "scores.safetensors").read_bytes()


@pytest.mark.usefixtures("few_audited")
@pytest.mark.parametrize("calls", [1, 4, 7])
def test_an_interrupted_race_goes_on_to_the_same_bits(
    run: Path, tmp_path: Path, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin = Path(shutil.copytree(run, tmp_path / "twin"))
    straight = attribute(twin, *KEYS, *RACE)
    whole, count = Engine.pair_losses, 0

    def dies(self: Engine, *arguments: object) -> object:
        nonlocal count
        count += 1
        if count > calls:
            raise KeyboardInterrupt
        return whole(self, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(Engine, "pair_losses", dies)
        assert main(["run", f"run={run}", "stages=[unlearn,score]", *KEYS, *RACE]) == 130
    mucs("run", f"run={run}", "stages=[unlearn,score]", *KEYS, *RACE)
    resumed = run / "score" / straight.name
    assert (resumed / "scores.safetensors").read_bytes() == (straight / "scores.safetensors").read_bytes()
    assert manifest_of(resumed)["races"] == manifest_of(straight)["races"]
    assert not list(run.rglob("*.partial"))
    assert not (resumed / "races").exists()


@pytest.mark.usefixtures("few_audited")
def test_where_the_audit_finds_that_too_much_is_lost_every_image_gets_the_whole_bank(
    run: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exact = iter(exact_of(finished))

    def wrong(values: np.ndarray, num_draws: int, k: int, confidence: float) -> np.ndarray:
        """Keeps images from the middle of a query's ranking, and says that the highest were furthest from staying."""
        place = next(exact).argsort().argsort()  # called once a query: k are left
        return np.where((place >= 20) & (place < 20 + k), 1.0, -1.0 - place)

    monkeypatch.setattr(races, "margins", wrong)
    monkeypatch.setattr(races, "AUDIT", 12)
    folder = attribute(run, *KEYS, *RACE)
    found = load_file(folder / "scores.safetensors")
    fell_back = [race["is_exact"] for race in manifest_of(folder)["races"].values()]
    assert any(fell_back)
    assert "going on with the whole bank for every image" in capsys.readouterr().err
    for query, is_exact in enumerate(fell_back):
        if is_exact:
            assert (found["draws"][query] == NUM_DRAWS).all()
            np.testing.assert_allclose(found["score"][query], exact_of(finished)[query], rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("few_audited")
def test_a_query_that_is_added_keeps_the_rows_of_the_others(run: Path) -> None:
    first = attribute(run, *KEYS, *RACE, "queries.index=0")
    before, facts = load_file(first / "scores.safetensors"), manifest_of(first)["races"]
    mucs("run", f"run={run}", "stages=[unlearn,score]", *KEYS, *RACE)
    after = load_file(first / "scores.safetensors")
    assert after["query_id"].tolist() == [0, 1]
    np.testing.assert_array_equal(after["score"][0], before["score"][0])
    np.testing.assert_array_equal(after["draws"][0], before["draws"][0])
    assert manifest_of(first)["races"]["0"] == facts["0"]


@pytest.mark.usefixtures("few_audited")
def test_a_damaged_row_of_the_base_losses_is_computed_again(run: Path) -> None:
    straight = attribute(run, *KEYS, *RACE)
    scores = (straight / "scores.safetensors").read_bytes()
    (path,) = (run / "score" / "_growing").rglob("losses.growing")
    shutil.rmtree(straight)
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    first = start + header["loss"]["data_offsets"][0]
    content[first + 1] ^= 0x10
    path.write_bytes(content)
    again = attribute(run, *KEYS, *RACE)
    assert (again / "scores.safetensors").read_bytes() == scores
    assert path.read_bytes()[first + 1] == content[first + 1] ^ 0x10  # mended


def test_base_losses_of_two_processes_come_together_in_the_file(run: Path) -> None:
    """Each has read the file before the other wrote."""
    mucs("unlearn", f"run={run}", *UNLEARN)
    context = Context.create("score", compose("score", (keys := [f"run={run}", *KEYS])), keys, run)
    work = Work.load(context)
    bank, bank_print = prepare_bank(context, context.config.noise_bank, work.inputs)

    def opened() -> GrowingLosses:
        return GrowingLosses(work, Engine(context, work.inputs, bank, context.config.noise_bank), bank_print)

    ours, theirs = opened(), opened()
    rows = np.array([3, 3, 5])
    ours.require(rows, np.array([0, 1, 0]))
    theirs.require(rows, np.array([2, 3, 0]))
    together = opened()
    known = np.argwhere(np.isfinite(together.loss)).tolist()
    assert known == [[3, 0], [3, 1], [3, 2], [3, 3], [5, 0]]
    np.testing.assert_array_equal(together.loss[3, :2], ours.loss[3, :2])
    np.testing.assert_array_equal(together.loss[3, 2:4], theirs.loss[3, 2:4])


def test_scores_of_mixed_draw_counts_are_no_members_and_have_no_datamodeling_score(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = attribute(run, *KEYS, *RACE).name
    attribute(run, *KEYS)
    for asked in (
        ["score", "method=ensemble", f"method.members=[{name},mucs]"],
        ["evaluate", "evaluation=lds", f"evaluation.variants=[{name}]"],
    ):
        assert f"got {name}, whose scores rest on different numbers of draws" in fails(capsys, *asked, f"run={run}")
    line = fails(capsys, "score", "method=ensemble", f"run={run}")  # not asked for, it is left out
    assert "an ensemble needs two" in line


def test_only_settled_places_are_shown_and_evaluated(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = attribute(run, *KEYS, *RACE)
    assert len((folder / "top.csv").read_text().splitlines()) == 1 + 2 * K
    mucs("show", f"run={run}", f"k={K}")
    settled = f"settled the {K} highest scores of {folder.name}"
    assert settled in fails(capsys, "show", f"run={run}", "k=4")
    assert "has not settled the lowest" in fails(capsys, "show", f"run={run}", "k=2", "bottom=true")
    assert settled in fails(capsys, "evaluate", "evaluation=overlap", f"run={run}", "evaluation.k=4")
    assert settled in fails(capsys, "evaluate", "evaluation=counterfactual", f"run={run}", "evaluation.k=4")
    mucs("report", f"run={run}", f"report.k={K}", f"report.group_k={K}")
    page = (run / "report" / "index.html").read_text()
    assert "settled the 3 highest scores of each query by a race" in page
    assert f"up to {NUM_DRAWS}" in page


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["method.reducer=ratio_of_means"], "score.mode: got adaptive with method.reducer=ratio_of_means"),
        (["noise_bank.consistent=false"], "score.mode: got adaptive with noise_bank.consistent=false"),
        (["score.top_k=41"], "score.top_k: got 41; expected at most 40"),
        (["score.group_k=9"], "score.group_k: got 9; score.mode=adaptive settles the 3 highest"),
        (["score.group_k=null", "score.top_k=0"], "score.top_k: got 0"),
        (["score.confidence=1"], "score.confidence"),
    ],
)
def test_what_cannot_race_is_refused(run: Path, keys: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    mucs("unlearn", f"run={run}", *UNLEARN)
    assert said in fails(capsys, "score", f"run={run}", *KEYS, *RACE, *keys)
    assert not list((run / "score").glob("mucs*"))


def test_a_method_without_draws_to_race_over_says_that_its_scores_are_exact(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mucs("score", f"run={run}", "method=pixel", "score.mode=adaptive")
    assert "score.mode=adaptive has no effect with method=pixel" in capsys.readouterr().err
    assert (run / "score" / "pixel" / "scores.safetensors").exists()


def test_a_key_of_scoring_typed_when_the_run_is_made_is_kept_where_it_changes_no_number(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make = ["data=digits", "data.limit=20", "model=dit", "model.width=8", "model.num_heads=2", "training.num_steps=1"]
    mucs("run", f"run={run}", "device=cpu", *make, "stages=[train]", "score.batch_size=32", "score.mode=adaptive")
    kept = json.loads((run / "run.json").read_text())["config"]["score"]
    assert kept["batch_size"] == 32
    assert kept["mode"] != "adaptive"  # it names a variant, as method keys do


def test_base_losses_that_are_not_finite_name_the_image(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Engine.pair_losses

    def broken(self: Engine, rows: np.ndarray, draws: np.ndarray, tensors: object) -> object:
        loss = whole(self, rows, draws, tensors)  # type: ignore[arg-type]
        return loss.where(torch.from_numpy(rows != 7), torch.nan)

    monkeypatch.setattr(Engine, "pair_losses", broken)
    mucs("unlearn", f"run={run}", *UNLEARN)
    assert "example 7 (" in fails(capsys, "score", f"run={run}", *KEYS, *RACE)


@pytest.mark.usefixtures("few_audited")
def test_speed_fast_is_the_adaptive_mode(run: Path) -> None:
    keys = [*UNLEARN, f"noise_bank.num_draws={NUM_DRAWS}", "score.batch_size=16", f"score.top_k={K}", "score.group_k=3"]
    folder = attribute(run, *keys, "speed=fast")
    assert folder.name.endswith(f"mode-adaptive__num_draws-{NUM_DRAWS}__num_steps-12__top_k-{K}")
    assert "draws" in load_file(folder / "scores.safetensors")


def test_a_race_is_planned_without_being_run(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mucs("unlearn", f"run={run}", *UNLEARN)
    mucs("score", f"run={run}", *KEYS, *RACE, "queries.index=0")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    monkeypatch.setattr(races, "LONG_REHEARSAL", 0.0)
    capsys.readouterr()
    mucs("score", f"run={run}", *KEYS, *RACE, "plan=true")
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "score, queries" in line]
    assert [word for word in row.split() if word.isdigit()] == ["1", "0", "1"]
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_what_may_race_is_what_has_values_of_single_draws() -> None:
    assert set(RACING_REDUCERS) == set(PER_DRAW)


def test_what_a_race_will_not_settle_is_refused_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = ["experiment=digits", "data.limit=40", "device=cpu", f"run={tmp_path / 'run'}", "speed=fast"]
    assert "report.k: got 10; score.mode=adaptive settles the 5 highest" in fails(capsys, "run", *new, "score.top_k=5")
    assert "score.mode: got adaptive with method.reducer" in fails(
        capsys, "run", *new, "method.reducer=absolute_difference"
    )
    assert not (tmp_path / "run" / "train").exists()


def test_keys_of_the_other_mode_are_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mucs("unlearn", f"run={run}", *UNLEARN)
    mucs("score", f"run={run}", *KEYS, "score.top_k=7")
    assert "score.top_k has no effect with score.mode=exact" in capsys.readouterr().err
    mucs("score", f"run={run}", *KEYS, *RACE, "score.keep_losses=true")
    assert "score.keep_losses has no effect with score.mode=adaptive" in capsys.readouterr().err


def test_groups_need_settled_places_and_growing_losses_can_be_cleaned(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = attribute(run, *KEYS, *RACE)
    show = ["show", f"run={run}", "group_by=label"]
    mucs(*show, f"group_k={K}")
    assert f"group_k: got 9; score.mode=adaptive has settled the {K} highest" in fails(capsys, *show, "group_k=9")
    mucs("status", f"run={run}", "clean=true")
    assert not (run / "score" / "_growing").exists() or not list((run / "score" / "_growing").rglob("*.growing"))
    assert (folder / "scores.safetensors").exists()
