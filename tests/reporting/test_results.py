"""Rankings read back from disk."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from reporting_runs import RunBuilder

from mucs_cli.artifacts import read_tensors, sha256_file, write_record, write_tensors
from mucs_cli.errors import UserError
from mucs_cli.records import read_manifest, read_record
from mucs_cli.reporting.comparison import differing_settings, overlap, spearman
from mucs_cli.reporting.evaluations import evaluation_views
from mucs_cli.reporting.results import RunResults, variant_order


def test_ranking_is_the_order_of_the_scores(finished: RunBuilder) -> None:
    results = RunResults(finished.run)
    ranked = results.ranking(results.variant("mucs"), 0, 5)
    expected = sorted(range(60), key=lambda i: -finished.score[0, i])[:5]
    assert [item.example_id for item in ranked] == expected
    assert [item.rank for item in ranked] == [1, 2, 3, 4, 5]
    assert [item.score for item in ranked] == [float(finished.score[0, i]) for i in expected]
    assert [item.file for item in ranked] == [f"digits[{i}]" for i in expected]
    assert [item.metadata for item in ranked] == [{"label": str(finished.label[i])} for i in expected]


def test_bottom_lists_the_lowest_first_with_their_ranks_from_the_top(finished: RunBuilder) -> None:
    results = RunResults(finished.run)
    ranked = results.ranking(results.variant("mucs"), 0, 2, bottom=True)
    assert [item.rank for item in ranked] == [60, 59]
    assert [item.example_id for item in ranked] == [int(i) for i in np.argsort(finished.score[0])[:2]]
    assert ranked[0].score < ranked[1].score


def test_equal_scores_are_ordered_by_example_id(make_run: Callable[..., RunBuilder]) -> None:
    run = make_run()
    run.data()
    run.sample()
    run.variant(score=np.zeros((3, 60), np.float32))
    results = RunResults(run.run)
    assert [item.example_id for item in results.ranking(results.variant("mucs"), 1, 4)] == [0, 1, 2, 3]


def test_exact_copies_are_found_marked_and_left_out(make_run: Callable[..., RunBuilder]) -> None:
    run = make_run()
    run.raw[41] = run.raw[3]  # a second copy of what query 2 shows
    results = RunResults(run.all().run)
    variant = results.variant("mucs")
    assert results.exact_copies == {0: [], 1: [], 2: [3, 41]}
    everything = results.ranking(variant, 2, 60)
    assert [item.example_id for item in everything if item.exact_copy] == [3, 41]
    assert [item.rank for item in everything if item.exact_copy] == [1, 2]
    left = results.ranking(variant, 2, 58, exclude_exact=True)
    assert [item.example_id for item in left] == [item.example_id for item in everything[2:]]
    assert left[0].rank == 1


@pytest.mark.parametrize(("exclude_exact", "most"), [(False, 60), (True, 59)])
def test_k_larger_than_what_there_is_to_rank_is_refused(finished: RunBuilder, exclude_exact: bool, most: int) -> None:
    results = RunResults(finished.run)
    assert len(results.ranking(results.variant("mucs"), 2, most, exclude_exact=exclude_exact)) == most
    with pytest.raises(UserError, match=rf"^report\.k: got {most + 1}; expected at most {most}, the training images"):
        results.ranking(results.variant("mucs"), 2, most + 1, exclude_exact=exclude_exact, key="report.k")


def test_unknown_variant_and_query_are_refused_with_the_choices(finished: RunBuilder) -> None:
    results = RunResults(finished.run)
    with pytest.raises(UserError, match=r"variant: got 'muc'; expected one of mucs\. Did you mean 'mucs'\?"):
        results.variant("muc")
    with pytest.raises(UserError, match="query: got 3; expected 0 to 2"):
        results.ranking(results.variant("mucs"), 3, 1)


def test_without_a_name_the_variant_is_the_only_one_or_mucs_or_an_error(make_run: Callable[..., RunBuilder]) -> None:
    run = make_run()
    run.data()
    run.sample()
    run.variant("a")
    assert RunResults(run.run).pick_variant(None).name == "a"
    run.variant("b")
    with pytest.raises(UserError, match="variant: is not set; expected one of a, b"):
        RunResults(run.run).pick_variant(None)
    run.variant("mucs")
    assert RunResults(run.run).pick_variant(None).name == "mucs"


def test_variants_are_ordered_by_the_numbers_in_their_names() -> None:
    names = ["max_steps-1000", "max_steps-50", "mucs", "max_steps-200", "weight-0.5", "weight-0.25"]
    expected = ["mucs", "max_steps-50", "max_steps-200", "max_steps-1000", "weight-0.25", "weight-0.5"]
    assert sorted(names, key=variant_order) == expected


def test_a_methods_own_keys_are_compared_with_those_of_the_same_method() -> None:
    configs = [
        {"method.name": "mucs", "method.reducer": "skew", "unlearning.steps": 5, "noise_bank.num_draws": 20},
        {"method.name": "mucs", "method.reducer": "difference", "unlearning.steps": 5, "noise_bank.num_draws": 20},
        {"method.name": "forward_inf", "method.reducer": "difference", "noise_bank.num_draws": 50},
        {"method.name": "random"},
    ]
    assert differing_settings(configs) == [
        {"noise_bank.num_draws": 20, "method.reducer": "skew"},
        {"noise_bank.num_draws": 20, "method.reducer": "difference"},
        {"noise_bank.num_draws": 50},
        {},
    ]


def test_folders_with_an_underscore_and_unfinished_ones_are_no_variants(finished: RunBuilder) -> None:
    (finished.run / "score" / "_base").mkdir()
    (finished.run / "score" / "half").mkdir()
    results = RunResults(finished.run)
    assert results.variant_names == ["mucs"]
    assert results.unfinished == ["half"]


def test_a_run_without_scores_or_without_a_folder_is_refused(make_run: Callable[..., RunBuilder]) -> None:
    run = make_run()
    with pytest.raises(UserError, match=r"run: got .*run; expected the folder of a finished run"):
        RunResults(run.run)
    run.data()
    run.sample()
    with pytest.raises(UserError, match="expected a finished `mucs score`"):
        RunResults(run.run)


def test_scores_of_other_queries_are_refused(finished: RunBuilder) -> None:
    finished.query = finished.query[::-1].copy()
    for name in ("manifest.json", "samples.safetensors"):
        (finished.run / "sample" / name).unlink()
    finished.sample()
    with pytest.raises(UserError, match=r"scores another query 0 \(\w{16}\) than this run has .* Rerun mucs score"):
        RunResults(finished.run).variant("mucs")


def test_damaged_scores_are_refused(finished: RunBuilder) -> None:
    path = finished.run / "score" / "mucs" / "scores.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-8])
    with pytest.raises(UserError, match="truncated"):
        RunResults(finished.run).variant("mucs")
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match="SHA-256 differs"):
        RunResults(finished.run).variant("mucs")


def changed(folder: Path, **parts: object) -> None:
    """The manifest with other parts, without those that are None; forged, so sealed."""
    record = read_record(folder / "manifest.json") | parts
    write_record(folder / "manifest.json", {key: value for key, value in record.items() if value is not None})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("table.md", ""),
        ("table.md", "title\n\n| variant |\n| :-- |\n| mucs |\n"),
        ("table.csv", "variant,auc,auc_low,auc_high\n"),
        ("table.csv", "variant,queries,auc,auc_low,auc_high,expected\nmucs,3,0.66,0.5,0.75,0.5\n"),
        ("table.csv", "variant,queries,auc,auc_low,auc_high\nmucs,3,0.66,0.10.1,0.75\n"),
    ],
)
def test_a_table_that_does_not_fit_its_other_form_is_refused(finished: RunBuilder, name: str, content: str) -> None:
    finished.evaluation()
    folder = finished.run / "evaluate" / "overlap"
    (folder / name).write_text(content)
    outputs = {file: {"sha256": sha256_file(folder / file), "bytes": 1} for file in ("table.md", "table.csv")}
    changed(folder, outputs=outputs, ended=None, seconds=None)
    with pytest.raises(UserError, match=r"table\.md: does not fit .*table\.csv"):
        evaluation_views(RunResults(finished.run), images=True)


@pytest.mark.parametrize("part", ["fingerprint", "levels"])
def test_data_without_what_scores_are_compared_by_are_refused(finished: RunBuilder, part: str) -> None:
    changed(finished.run / "data", **{part: None})
    results = RunResults(finished.run)
    with pytest.raises(UserError, match=rf"data/manifest\.json: has no '{part}' where mucs writes one"):
        _ = results.variants, results.levels


def replaced(run: RunBuilder, folder: str, file: str, **tensors: torch.Tensor | None) -> None:
    """Other tensors in a file of a stage, whose manifest has the right hash; None takes one away."""
    path = run.run / folder / file
    found = read_tensors(path) | tensors
    write_tensors(path, {name: tensor for name, tensor in found.items() if tensor is not None})
    outputs = read_record(path.parent / "manifest.json")["outputs"]
    changed(path.parent, outputs=outputs | {file: {"sha256": sha256_file(path), "bytes": 1}})


@pytest.mark.parametrize(
    ("folder", "file", "tensors", "got"),
    [
        ("score/mucs", "scores.safetensors", {"score": None}, "got none for 'score'; expected float32 Q N"),
        ("score/mucs", "scores.safetensors", {"score": torch.zeros(3, 60).double()}, r"got float64 \[3, 60\] for"),
        ("score/mucs", "scores.safetensors", {"example_id": torch.arange(59)}, "expected int64 N with N = 60"),
        ("score/mucs", "scores.safetensors", {"query_id": torch.zeros(3, 1).long()}, "expected int64 Q with Q = 3"),
        ("sample", "samples.safetensors", {"image": torch.zeros(3, 8, 8)}, "expected float32 Q C H W"),
        ("sample", "samples.safetensors", {"role": torch.zeros(2).long()}, "expected int64 Q with Q = 3"),
        ("data", "images.safetensors", {"image": torch.zeros(9, 1, 8, 8).byte()}, "float32|N = 60"),
        ("data", "images.safetensors", {"image": torch.zeros(60, 1, 8, 0).byte()}, r"got uint8 \[60, 1, 8, 0\]"),
    ],
)
def test_tensors_of_another_form_are_refused_though_their_hash_is_right(
    finished: RunBuilder, folder: str, file: str, tensors: dict[str, torch.Tensor | None], got: str
) -> None:
    replaced(finished, folder, file, **tensors)
    results = RunResults(finished.run)
    with pytest.raises(UserError, match=got) as caught:
        _ = results.variants, results.samples, results.images
    assert caught.value.subject == str(finished.run / folder / file)


@pytest.mark.parametrize(
    ("name", "place", "number", "got"),
    [
        ("example_id", 0, -1, "got example_id that do not ascend from 0 or more"),
        ("query_id", 0, -1, "got query_id that do not ascend"),
        ("example_id", -1, 9999, "scores image 9999; this run has"),
        ("query_id", -1, 77, "scores query 77; this run has"),
    ],
)
def test_scores_of_images_or_queries_that_cannot_be_are_refused(
    finished: RunBuilder, name: str, place: int, number: int, got: str
) -> None:
    folder = finished.run / "score" / "mucs"
    tensors = read_tensors(folder / "scores.safetensors")
    tensors[name][place] = number
    write_tensors(folder / "scores.safetensors", tensors)
    sha256 = sha256_file(folder / "scores.safetensors")
    changed(folder, outputs={"scores.safetensors": {"sha256": sha256, "bytes": 1}})
    with pytest.raises(UserError, match=got):
        RunResults(finished.run).variant("mucs")


def test_images_are_read_back_as_they_were(finished: RunBuilder) -> None:
    results = RunResults(finished.run)
    np.testing.assert_allclose(results.training_image(7), finished.image(finished.raw[7]), atol=1e-6)
    assert results.training_image(7).min() == -1
    path = finished.run / "data" / "images.safetensors"
    write_tensors(path, {"image": results.samples["image"].byte()})
    with pytest.raises(UserError, match="SHA-256 differs"):
        _ = RunResults(finished.run).images


def test_spearman_and_overlap_against_closed_forms(make_run: Callable[..., RunBuilder]) -> None:
    run = make_run(num_images=5, num_queries=1)
    run.data()
    run.sample()
    run.variant("a", np.array([[0.1, 0.2, 0.3, 0.4, 0.5]], np.float32))
    run.variant("b", np.array([[0.2, 0.1, 0.3, 0.5, 0.4]], np.float32))
    run.variant("flat", np.zeros((1, 5), np.float32))
    results = RunResults(run.run)
    a, b = results.variant("a"), results.variant("b")
    assert spearman(a, b, 0) == pytest.approx(1 - 6 * 4 / (5 * 24))  # 1 - 6 sum d^2 / (n (n^2 - 1))
    assert spearman(a, results.variant("flat"), 0) is None
    assert overlap(results.ranking(a, 0, 2), results.ranking(b, 0, 2)) == 2
    assert overlap(results.ranking(a, 0, 1), results.ranking(b, 0, 1)) == 0


def test_queries_are_shown_and_compared_as_pictures_where_latents_are_attributed(
    make_run: Callable[..., RunBuilder],
) -> None:
    run = make_run()
    run.data()
    picture = np.stack([run.image(run.raw[i]) for i in (9, 11, 13)])
    run.sample(picture=picture)
    run.variant()
    results = RunResults(run.run)
    np.testing.assert_array_equal(results.queries, picture)
    assert results.exact_copies == {0: [9], 1: [11], 2: [13]}  # the latent of query 2 equals image 3


def test_a_run_may_have_more_queries_than_were_scored(make_run: Callable[..., RunBuilder]) -> None:
    run = make_run()
    run.data()
    run.sample()
    run.variant(score=run.score[:1])
    run.variant("all")
    results = RunResults(run.run)
    assert results.unscored(results.variant("mucs")) == [1, 2]
    assert results.unscored(results.variant("all")) == []
    with pytest.raises(UserError, match="query: got 1; expected one of 0, the queries of mucs"):
        results.variant("mucs").scores_of(1)


def test_only_changed_queries_make_scores_invalid(make_run: Callable[..., RunBuilder]) -> None:
    run = make_run()
    run.data()
    run.sample()
    run.variant(score=run.score[:2])

    def sample_again(query: int) -> None:
        run.query[query] = 0
        for name in ("manifest.json", "samples.safetensors"):
            (run.run / "sample" / name).unlink()
        run.sample()

    sample_again(2)
    assert RunResults(run.run).variant("mucs").query_ids == [0, 1]
    sample_again(1)
    with pytest.raises(UserError, match=r"scores another query 1 "):
        RunResults(run.run).variant("mucs")


def test_queries_of_a_folder_have_their_file_and_metadata(make_run: Callable[..., RunBuilder]) -> None:
    run = make_run().all()
    assert RunResults(run.run).query_file(1) is None
    assert RunResults(run.run).query_metadata(1) == {}
    (run.run / "sample" / "manifest.json").unlink()
    run.sample(files=["a.png", "sub/b.png", "c.png"])
    results = RunResults(run.run)
    assert results.query_file(1) == "sub/b.png"
    assert results.query_metadata(1) == {"prompt": "prompt of sub/b.png"}
    path, manifest = run.run / "sample" / "queries.csv", read_manifest(run.run / "sample" / "manifest.json")
    for text, message in (
        ("query,file\n0\n", r"queries\.csv: cannot be read .* Rerun mucs sample"),
        ("name,file\n0,a.png\n", r"queries\.csv: expected columns query \(a number\) and file"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=r"queries\.csv: is not the file its manifest names"):
            RunResults(run.run).query_file(1)
        manifest["outputs"][path.name]["sha256"] = sha256_file(path)
        write_record(path.parent / "manifest.json", manifest)
        with pytest.raises(UserError, match=message):
            RunResults(run.run).query_file(1)


def test_a_caption_may_be_of_any_length(make_run: Callable[..., RunBuilder]) -> None:
    run = make_run()
    run.data(metadata={"caption": ["long " * 40_000] * 60})
    run.sample()
    run.variant()
    assert len(RunResults(run.run).metadata(5)["caption"]) == 200_000
