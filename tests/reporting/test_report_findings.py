"""``mucs report``: warnings, evaluations, ensembles, fingerprints, and how the page is built."""

import base64
import itertools
from collections.abc import Callable

import numpy as np
import pytest
from pages import Page
from PIL import Image
from reporting_runs import LINE_ART, RunBuilder, make_report

from mucs_cli import __version__
from mucs_cli.errors import UserError
from mucs_cli.records import read_json
from mucs_cli.reporting.evaluations import row_spans
from mucs_cli.reporting.tables import Table

VERDICT = "No influential image found"


def part(page: Page, start: str, end: str) -> str:
    """The text from ``start`` up to ``end``."""
    return page.text.split(start, 1)[1].split(end, 1)[0]


# --- warnings --------------------------------------------------------------------------------------------------------


def noise_with_a_cause(num_queries: int, caused: int) -> np.ndarray:
    """Uniform scores; those of the query ``caused`` have an outlier at image 7."""
    scores = np.random.default_rng(0).uniform(-0.1, 0.1, (num_queries, 60)).astype(np.float32)
    scores[caused, 7] = 2.0
    return scores


def test_a_query_whose_top_stands_out_nowhere_says_so_in_words(make_run: Callable[..., RunBuilder]) -> None:
    run = make_run()
    run.data()
    run.sample()
    run.variant("mucs", noise_with_a_cause(3, caused=1))
    page = Page(make_report(run.run, k=3))
    assert f"{VERDICT} for queries 0, 2: their highest scores do not stand out" in page.text
    assert [VERDICT in part(page, f"Query {q} ", "All scores") for q in range(3)] == [True, False, True]
    assert "robust standard deviations (1.4826 times the median absolute deviation)" in page.text
    bulk = noise_with_a_cause(3, caused=1)[1]
    spread = 1.4826 * np.median(np.abs(bulk - np.median(bulk)))
    assert f"the highest stands out (z {(2 - np.median(bulk)) / spread:.1f}, more than" in page.text


def test_one_variant_whose_top_stands_out_is_enough(make_run: Callable[..., RunBuilder]) -> None:
    run = make_run()
    run.data()
    run.sample()
    run.variant("mucs", noise_with_a_cause(3, caused=1))
    run.variant("mucs__forget_weight-0.5", noise_with_a_cause(3, caused=0), forget_weight=0.5)
    page = Page(make_report(run.run, k=3))
    assert (
        f"{VERDICT} for query 2: its highest scores do not stand out from the bulk of the scores, in any" in page.text
    )
    assert page.text.count(f"{VERDICT}.") == 1
    glance = part(page, "At a glance", "Stands out is decided")
    assert [words in glance for words in ("in mucs__forget_weight-0.5 id", "in mucs id", "in no variant id")] == [
        True
    ] * 3


def test_an_exact_copy_that_is_left_out_does_not_count_as_standing_out(make_run: Callable[..., RunBuilder]) -> None:
    run = make_run()
    run.data()
    run.sample()
    scores = noise_with_a_cause(3, caused=1)
    scores[2, 3] = 2.0  # image 3 is query 2 itself
    run.variant("mucs", scores)
    assert f"{VERDICT} for query 0:" in Page(make_report(run.run, k=3)).text
    assert f"{VERDICT} for queries 0, 2:" in Page(make_report(run.run, k=3, exclude_exact=True)).text


def test_a_query_that_nearly_equals_a_training_image_is_named(make_run: Callable[..., RunBuilder]) -> None:
    run = make_run()
    nudged = run.image(run.raw[20])
    nudged[0, 4, 4] += 0.1 if nudged[0, 4, 4] < 0 else -0.1  # 0.05 of 0 to 1 in one of 64 pixels: 0.00625
    run.query[0] = nudged
    run.all()
    page = Page(make_report(run.run, k=3))
    assert "Near-duplicates : queries 0, 2 nearly equal a training image" in page.text
    assert "Nearly equal to training image 20 , digits[20]: the pixels differ by 0.006" in page.text
    assert "Equal to training image 3 , digits[3]: the pixels differ by 0.000" in page.text
    assert "qual to training image" not in part(page, "Query 1 ", "Query 2 ")
    pixels = (run.query[1] + 1) / 2, run.raw / 16
    distances = np.sqrt(((pixels[0] - pixels[1]) ** 2).mean(axis=(1, 2, 3)))
    assert f"id {distances.argmin()}, pixel difference {distances.min():.3f}" in part(page, "Query 1 ", "Query 2 ")


def test_a_held_out_image_is_said_to_be_one_and_no_copy_of_the_model(make_run: Callable[..., RunBuilder]) -> None:
    run = make_run()
    run.held_out = (2,)  # image 3 itself
    run.all()
    page = Page(make_report(run.run, k=3))
    assert "Query 2, held out of training" in page.text
    assert "but for those that were held out of its training" in page.text
    assert "Equal to training image 3" in page.text
    assert "may have copied" not in page.text
    assert "generated images 2 held-out images 1" in page.text


# --- evaluations and ensembles ---------------------------------------------------------------------------------------


def test_an_evaluation_stands_with_its_table_its_charts_and_what_it_is_of(finished: RunBuilder) -> None:
    assert "#evaluations" not in [a["href"] for a in Page(make_report(finished.run, k=3)).all("a")]
    finished.evaluation("lds", charts={"interval_bars": LINE_ART})
    page = Page(make_report(finished.run, k=3))
    shown = part(page, "Linear datamodeling score", "Groups over all")
    assert (
        "results of lds, 95% intervals; of what; bold : the best; underlined : not distinguishable from the best "
        "variant queries auc expected" in shown
    )
    assert "<b>0.660 [0.500, 0.750]</b>" in page.source and "<u>0.400</u>" in page.source
    assert "mucs 3 0.660 [0.500, 0.750] 0.500" in shown
    assert "pixel <b> 3 0.400 0.500" in shown
    assert "variants mucs queries all counts models 3 settings k 5" in shown
    assert read_json(finished.run / "evaluate" / "lds" / "manifest.json")["ended"][:10] in shown
    (chart,) = page.all("img")
    assert chart["src"] == "data:image/svg+xml;base64," + base64.b64encode(LINE_ART.encode()).decode()
    assert chart["alt"] == "lds: chart, interval bars; its numbers are in the table"


def test_names_that_repeat_from_row_to_row_are_told_once() -> None:
    rows = [("a", "x", 1, "m"), ("a", "x", 2, "m"), ("a", "y", 2, "m"), ("b", "y", 3, "m")]
    assert row_spans(Table("of what", ("method", "baseline", "count", "unit"), rows)) == [
        [3, 2, 1, 1],
        [0, 0, 1, 1],
        [0, 1, 1, 1],  # the unit stands right of numbers: each row tells it
        [1, 1, 1, 1],  # the baseline of another method
    ]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("overlap", "it describes the data rather than the query"),
        ("retrieval", "It does not show that those images caused the query"),
        ("lds", "a good LDS does not show that the first image of a ranking is a cause"),
        ("counterfactual", "against a random baseline 0.5 is no better than random"),
        ("of_my_own", "what its numbers mean is said where it is defined"),
    ],
)
def test_each_kind_of_evaluation_is_put_into_words(finished: RunBuilder, name: str, words: str) -> None:
    finished.evaluation(name)
    assert words in part(Page(make_report(finished.run, k=3)), "What was measured", "Groups over all")


def test_an_evaluation_of_scores_that_have_changed_since_says_so(finished: RunBuilder) -> None:
    finished.evaluation("overlap")
    assert "not those that were evaluated" not in Page(make_report(finished.run, k=3)).text
    finished.variant("mucs", finished.score * 2)
    text = Page(make_report(finished.run, k=3)).text
    assert "The scores of mucs are not those that were evaluated. Run mucs evaluate evaluation=overlap again." in text


def test_an_unfinished_evaluation_is_named_and_a_damaged_one_refused(finished: RunBuilder) -> None:
    (finished.run / "evaluate" / "lds").mkdir(parents=True)
    assert "they have not finished: evaluations lds." in Page(make_report(finished.run, k=3)).text
    finished.evaluation("overlap")
    (finished.run / "evaluate" / "overlap" / "table.csv").write_text("variant,auc\nmucs,1.0\n")
    with pytest.raises(UserError, match=r"overlap/table\.csv: is not the file its manifest names"):
        make_report(finished.run, k=3)


def test_an_ensemble_stands_with_its_members_and_their_agreement(finished: RunBuilder) -> None:
    finished.variant("pixel", finished.score * 2, unlearns=False, method="pixel")
    finished.ensemble(["mucs", "pixel", "trak"], spearman=None, overlap=0.25)
    text = part(Page(make_report(finished.run, k=3)), "An ensemble combines", "Groups over all")
    assert "Combined by rank mean of mucs (weight 1), pixel (weight 2), trak (weight 3)" in text
    assert "means over 3 queries" in text and "top-7 overlap" in text
    for pair in ("mucs pixel", "mucs trak", "pixel trak"):
        assert f"{pair} – 0.250 0.125" in text


# --- unlearning and citation -----------------------------------------------------------------------------------------


def test_the_unlearning_table_has_the_loss_of_the_query_before_and_after(finished: RunBuilder) -> None:
    text = part(Page(make_report(finished.run, k=3)), "Unlearning with a bound", "Training of the base model")
    assert "query’s loss before query’s loss after forget loss" in text
    assert "1 31 yes 0.265625 1.14062 0.96 0.31 2.5 s" in text
    assert "Unlearning without a bound" not in text


def test_nothing_is_said_of_a_bound_where_the_method_has_none(make_run: Callable[..., RunBuilder]) -> None:
    run = make_run()
    run.data()
    run.sample()
    run.variant("forward_inf", method="forward_inf", bounded=False)
    text = Page(make_report(run.run, k=3)).text
    shown = text.split("Unlearning without a bound makes a set number of steps")[1].split("How to cite")[0]
    assert "bound" not in shown and "1 31 0.265625 1.14062" in shown
    assert "Unlearning with a bound" not in text and "did not reach" not in text
    assert "(u − t)" not in text.split("Variants")[0]  # MUCS's score is another one


def test_the_citation_identifies_method_tool_data_and_run(finished: RunBuilder) -> None:
    finished.variant("dtrak", finished.score * 2, unlearns=False, method="dtrak")
    page = Page(make_report(finished.run, k=3))
    text = part(page, "How to cite method mucs", "Run facts")
    manifests = [read_json(finished.run / "score" / name / "manifest.json") for name in ("mucs", "dtrak")]
    assert "arXiv 2605.17938" in text and "method dtrak D-TRAK: Zheng et al., arXiv 2311.00500" in text
    assert f"tool mucs {__version__}" in text and "E. Alpaydin, C. Kaynak (1998)." in text
    assert f"run run, scored {manifests[0]['ended'][:10]}" in text
    sample = read_json(finished.run / "sample" / "manifest.json")
    for name, value in (
        ("data", read_json(finished.run / "data" / "manifest.json")["fingerprint"]),
        ("model", "0" * 64),
        ("queries", sample["outputs"]["samples.safetensors"]["sha256"]),
        ("scores of mucs", manifests[0]["outputs"]["scores.safetensors"]["sha256"]),
        ("scores of dtrak", manifests[1]["outputs"]["scores.safetensors"]["sha256"]),
    ):
        assert f"{name} {value}" in text


# --- how it is built -------------------------------------------------------------------------------------------------


def test_headings_follow_each_other_without_a_gap(finished: RunBuilder) -> None:
    finished.evaluation("overlap")
    finished.ensemble(["mucs", "pixel"], spearman=0.5, overlap=0.25)
    page = Page(make_report(finished.run, k=3))
    levels = [int(tag[1]) for tag, _ in page.elements if tag in ("h1", "h2", "h3", "h4")]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert {2, 3, 4} <= set(levels)
    first = next(attributes for tag, attributes in page.elements if tag == "a")
    assert (first["class"], first["href"]) == ("skip", "#main")


def photographs(count: int, seed: int) -> np.ndarray:
    """Smooth colours with the noise of a camera; uint8 [count, 3, 128, 128]."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 12, 12, 3), dtype=np.uint8)
    smooth = [np.asarray(Image.fromarray(image).resize((128, 128), Image.Resampling.BICUBIC)) for image in coarse]
    noisy = np.stack(smooth) + rng.normal(0, 6, (count, 128, 128, 1))
    return noisy.clip(0, 255).astype(np.uint8).transpose(0, 3, 1, 2)


def test_twenty_queries_of_fifty_large_images_in_three_variants_stay_below_15_mb(
    make_run: Callable[..., RunBuilder],
) -> None:
    num_images, k = 1500, 50
    run = make_run()
    run.raw, run.levels = photographs(num_images, 0), 255
    run.label = np.arange(num_images) % 10
    run.files = [f"folder/with a long name/photograph_{i:05}.jpeg" for i in range(num_images)]
    run.query = (photographs(20, 1) / 127.5 - 1).astype(np.float32)
    run.data()
    run.sample()
    for v, name in enumerate(("mucs", "mucs__forget_weight-0.1", "mucs__forget_weight-0.5")):
        scores = np.random.default_rng(v).normal(0, 0.01, (20, num_images)).astype(np.float32)
        for query in range(20):
            scores[query, (500 * v + k * query + np.arange(k)) % num_images] += 1
        run.variant(name, scores)
    path = make_report(run.run, k=k)
    page = Page(path)
    assert len(page.all("image")) >= num_images  # all of them are shown, each once
    assert [a.get("class") for a in page.all("ol")].count("tiles") == 60
    assert max(int(image["width"] or 0) for image in page.all("image")) <= 128
    assert 5e6 < path.stat().st_size < 15e6
    assert "The pictures are thumbnails, compressed with loss" in page.text
