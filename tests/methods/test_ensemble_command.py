"""``method=ensemble`` through the command line: finished scores of several variants as one."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import fails, mucs, scores_of
from method_runs import NUM_IMAGES, NUM_QUERIES, PLANTED, stamps
from safetensors.torch import load_file, save_file

from mucs_cli.artifacts import sha256_file, write_record


@pytest.fixture(scope="module")
def scored(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of digits with three members; no test changes it."""
    run = Path(shutil.copytree(finished, tmp_path_factory.mktemp("scored") / "digits"))
    mucs("score", "-m", f"run={run}", "method=random,pixel,condition")
    return run


@pytest.fixture
def members(scored: Path, tmp_path: Path) -> Path:
    """A copy of ``scored`` to do things to."""
    return Path(shutil.copytree(scored, tmp_path / "members"))


def write_scores(run: Path, variant: str, score: np.ndarray) -> None:
    """Puts other scores into a variant, with a manifest that fits them."""
    folder = run / "score" / variant
    path, manifest = folder / "scores.safetensors", json.loads((folder / "manifest.json").read_text())
    save_file(load_file(path) | {"score": torch.tensor(score)}, path)
    manifest["outputs"][path.name]["sha256"] = sha256_file(path)
    write_record(folder / "manifest.json", manifest)


def ranks(scores: np.ndarray) -> np.ndarray:
    """1 for the lowest; the scores have no ties."""
    return scores.argsort(axis=1).argsort(axis=1) + 1.0


def members_of(run: Path, variant: str) -> dict:
    return json.loads((run / "score" / variant / "members.json").read_text())


def test_each_combination_is_what_numpy_makes_of_the_members_files(members: Path) -> None:
    chosen = "method.members=[pixel,random]"
    mucs("score", "-m", f"run={members}", "method=ensemble", chosen, "method.combine=rank_mean,z_mean,borda")
    pixel, random = scores_of(members, "pixel"), scores_of(members, "random")
    np.testing.assert_allclose(
        scores_of(members, "ensemble__members-pixel+random"), (ranks(pixel) + ranks(random)) / 2, rtol=1e-6
    )
    z = [(s - s.mean(1, keepdims=True)) / s.std(1, keepdims=True) for s in (pixel, random)]
    np.testing.assert_allclose(
        scores_of(members, "ensemble__combine-z_mean__members-pixel+random"),
        np.clip(z, -5, 5).mean(axis=0),
        atol=1e-5,
    )
    points = [np.maximum(ranks(s) - (NUM_IMAGES - 10), 0) for s in (pixel, random)]  # 10, 9, ... 1 for the highest
    np.testing.assert_allclose(
        scores_of(members, "ensemble__combine-borda__members-pixel+random"), np.mean(points, axis=0), rtol=1e-6
    )


def test_weights_and_k_count_and_name_the_variant(members: Path) -> None:
    command = ["score", f"run={members}", "method=ensemble", "method.members=[pixel,random]"]
    mucs(*command, "method.weights=[3,1]")
    expected = (3 * ranks(scores_of(members, "pixel")) + ranks(scores_of(members, "random"))) / 4
    np.testing.assert_allclose(scores_of(members, "ensemble__members-pixel+random__weights-3+1"), expected, rtol=1e-6)
    mucs(*command, "method.combine=borda", "method.k=3")
    scores = scores_of(members, "ensemble__combine-borda__k-3__members-pixel+random")
    assert scores.sum(axis=1).tolist() == [6.0] * NUM_QUERIES


def test_an_ensemble_of_identical_members_ranks_as_they_do(members: Path) -> None:
    shutil.copytree(members / "score" / "pixel", members / "score" / "copy")
    mucs("score", f"run={members}", "method=ensemble", "method.members=[pixel,copy]")
    mucs("score", f"run={members}", "method=ensemble", "method.members=[pixel,copy]", "method.combine=z_mean")
    pixel = scores_of(members, "pixel")
    np.testing.assert_array_equal(scores_of(members, "ensemble__members-pixel+copy"), ranks(pixel))
    z = scores_of(members, "ensemble__combine-z_mean__members-pixel+copy")
    np.testing.assert_array_equal(ranks(z), ranks(pixel))
    diversity = members_of(members, "ensemble__members-pixel+copy")
    assert diversity["spearman"] == [[1.0, 1.0], [1.0, 1.0]]
    assert diversity["top_k_overlap"] == [[1.0, 1.0], [1.0, 1.0]]


def test_members_json_has_the_correlations_and_top_overlaps_of_every_two_members(members: Path) -> None:
    mucs("score", f"run={members}", "method=ensemble")
    found = members_of(members, "ensemble")
    assert found["members"] == ["condition", "pixel", "random"]
    assert found["queries"] == list(range(NUM_QUERIES))
    assert (found["k"], found["expected_top_k_overlap"]) == (10, pytest.approx(10 / NUM_IMAGES))
    pixel, random = scores_of(members, "pixel"), scores_of(members, "random")
    correlation = [np.corrcoef(a, b)[0, 1] for a, b in zip(ranks(pixel), ranks(random), strict=True)]
    assert found["spearman"][1][2] == pytest.approx(np.mean(correlation), abs=1e-8)
    shared = [len({*np.argsort(-a)[:10]} & {*np.argsort(-b)[:10]}) / 10 for a, b in zip(pixel, random, strict=True)]
    assert found["top_k_overlap"][1][2] == pytest.approx(np.mean(shared), abs=1e-8)


def test_a_member_that_says_nothing_is_left_out_and_its_correlations_are_null(members: Path) -> None:
    score = scores_of(members, "random")
    score[:] = 0.5
    write_scores(members, "random", score)
    mucs("score", f"run={members}", "method=ensemble", "method.members=[pixel,random]")
    variant = "ensemble__members-pixel+random"
    np.testing.assert_array_equal(scores_of(members, variant), ranks(scores_of(members, "pixel")))
    found = members_of(members, variant)
    assert found["spearman"] == found["top_k_overlap"] == [[1.0, None], [None, None]]


def test_without_names_every_variant_but_ensembles_is_a_member_and_a_new_one_is_named(
    members: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mucs("score", f"run={members}", "method=ensemble", "method.members=[pixel,random]")
    mucs("score", f"run={members}", "method=ensemble")
    assert members_of(members, "ensemble")["members"] == ["condition", "pixel", "random"]
    before = stamps(members)
    mucs("score", f"run={members}", "method=ensemble")
    assert stamps(members) == before
    mucs("score", f"run={members}", "method=pixel", "method.similarity=euclidean")
    line = fails(capsys, "score", f"run={members}", "method=ensemble")
    assert "inputs.members: got ['condition', 'pixel', 'pixel__similarity-euclidean', 'random'];" in line
    mucs("score", f"run={members}", "method=ensemble", "overwrite=true")
    assert len(members_of(members, "ensemble")["members"]) == 4


def test_new_queries_are_added_once_every_member_has_them(members: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["score", f"run={members}", "method=ensemble", "method.members=[pixel,random]"]
    mucs(*command, "queries.index=[0,1]")
    variant = "ensemble__members-pixel+random"
    before = scores_of(members, variant)
    mucs("sample", f"run={members}", "queries.num=4")
    mucs("score", f"run={members}", "method=pixel")
    line = fails(capsys, *command)
    assert "method.members: got random, which has no scores of query 3 (1 of 4 are missing)." in line
    mucs("score", f"run={members}", "method=random")
    mucs(*command)
    assert (scores_of(members, variant)[:2] == before).all()
    assert len(scores_of(members, variant)) == 4
    assert members_of(members, variant)["queries"] == [0, 1, 2, 3]


def test_scores_that_have_changed_since_are_named(members: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["score", f"run={members}", "method=ensemble", "method.members=[pixel,random]"]
    mucs(*command)
    mucs("score", f"run={members}", "method=random", "method.seed=7")
    shutil.rmtree(members / "score" / "random")
    (members / "score" / "random__method.seed-7").rename(members / "score" / "random")
    line = fails(capsys, *command)
    assert "scores of random of query 0: got " in line and "overwrite=true" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["method.members=[pixel]"], "method.members: got pixel; an ensemble needs two."),
        (["method.members=[]"], "method.members: got none; an ensemble needs two."),
        (["method.members=[pixel,randm]"], "method.members: got 'randm'; expected some of condition, pixel, random."),
        (["method.members=[pixel,randm]"], "Did you mean 'random'?"),
        (["method.members=[pixel,pixel]"], "method.members: got pixel twice;"),
        (["method.members=[pixel,_base]"], "method.members: got '_base';"),
        (["method.members=[pixel,../score/random]"], "method.members: got '../score/random';"),
        (["method.members=[pixel,random]", "method.weights=[1]"], "method.weights: got 1 of them for 2 members;"),
        (["method.members=[pixel,random]", "method.weights=[1,-1]"], "method.weights: got [1.0, -1.0]; expected"),
        (["method.members=[pixel,random]", "method.weights=[0,0]"], "method.weights: got [0.0, 0.0]; expected"),
        (["method.weights=[1,1,1]"], "method.weights: got [1.0, 1.0, 1.0] without method.members,"),
        (["method.k=91"], "method.k: got 91; expected at most 90"),
    ],
)
def test_members_and_weights_that_cannot_be_are_named_and_nothing_is_written(
    arguments: list[str], message: str, scored: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = stamps(scored)
    assert message in fails(capsys, "score", f"run={scored}", "method=ensemble", *arguments)
    assert stamps(scored) == before


def test_a_damaged_an_unfinished_and_a_foreign_member_are_named(
    members: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["score", f"run={members}", "method=ensemble", "method.members=[pixel,random]"]
    folder = members / "score" / "random"
    path, manifest = folder / "scores.safetensors", folder / "manifest.json"
    whole, recorded = path.read_bytes(), manifest.read_text()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    line = fails(capsys, *command)
    assert str(path) in line and "SHA-256" in line
    path.write_bytes(whole)
    changed = json.loads(recorded)
    changed["inputs"]["model"] = "0" * 64
    write_record(manifest, changed)
    assert "got scores of another model (0000000000000000)" in fails(capsys, *command)
    manifest.rename(folder / "state.json")
    assert "method.members: got 'random', which has not finished;" in fails(capsys, *command)


def test_an_ensemble_may_be_named_as_a_member_of_another(members: Path) -> None:
    first = "ensemble__members-pixel+random"
    mucs("score", f"run={members}", "method=ensemble", "method.members=[pixel,random]")
    write_scores(members, first, ranks(scores_of(members, "pixel")).astype(np.float32))  # without ties
    mucs("score", f"run={members}", "method=ensemble", f"method.members=[{first},condition]")
    (second,) = [path.name for path in (members / "score").glob("ensemble__members-ensemble*")]
    expected = (ranks(scores_of(members, "condition")) + ranks(scores_of(members, "pixel"))) / 2
    np.testing.assert_allclose(scores_of(members, second), expected, rtol=1e-6)


def test_an_exact_copy_is_first_in_an_ensemble_of_methods_that_find_it(planted: Path) -> None:
    mucs("score", "-m", f"run={planted}", "method=pixel", "method.similarity=cosine,euclidean")
    names = "pixel,pixel__similarity-euclidean"
    mucs("score", f"run={planted}", "method=ensemble", f"method.members=[{names}]")
    (variant,) = [p.name for p in (planted / "score").glob("ensemble__members-pixel*")]
    assert scores_of(planted, variant).argmax(axis=1).tolist() == list(PLANTED)
