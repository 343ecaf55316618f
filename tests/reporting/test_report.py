"""``mucs report``: what stands on the page and in the picture, and when they are written again."""

import base64
import hashlib
import html
import io
import itertools
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pages import Page
from PIL import Image
from reporting_runs import LINE_ART, PHOTOGRAPH, RunBuilder, make_report

from mucs_cli.data.dataset import load_dataset
from mucs_cli.errors import UserError
from mucs_cli.records import read_json
from mucs_cli.reporting.pictures import BLUE, HEADER, MARGIN, ROW, TILE
from mucs_cli.schemas import DigitsConfig
from mucs_cli.stage_folder import require_manifest
from mucs_cli.stages import report


def pictures(page: Page) -> list[tuple[str, str]]:
    """Every picture of a query or a training image: its description, and the element that it shows."""
    found = []
    for (tag, svg), (_, use) in itertools.pairwise(page.elements):
        if tag == "svg" and svg.get("class") == "picture":
            found.append((svg["aria-label"] or "", (use["href"] or "").removeprefix("#")))
    return found


def tiles(page: Page) -> list[str]:
    """Descriptions of the pictures beside which a ranking is read: the queries, and the ranked images."""
    return [alt for alt, _ in pictures(page) if "Generated" in alt or "rank" in alt]


def pixels_of(image: dict[str, str | None]) -> np.ndarray:
    uri = image["href"]
    assert uri is not None and uri.startswith("data:image/png;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))


def test_each_query_stands_before_its_top_images_in_order(finished: RunBuilder) -> None:
    page = Page(make_report(finished.run, k=4))
    expected = []
    for query in range(3):
        expected.append(f"Generated image, query {query}")
        order = np.argsort(-finished.score[query], kind="stable")[:4]
        expected += [f"Training image {i}, rank {rank}" for rank, i in enumerate(order, 1)]
    assert tiles(page) == expected


def test_the_pictures_are_the_images_that_their_captions_name(finished: RunBuilder) -> None:
    page = Page(make_report(finished.run, k=4))
    sheet = {image["id"]: image for image in page.all("image")}
    ranked = [(re.fullmatch(r"Training image (\d+), rank \d+", alt), shown) for alt, shown in pictures(page)]
    assert sum(found is not None for found, _ in ranked) == 3 * 4
    for found, shown in ranked:
        if found:
            expected = np.rint(finished.raw[int(found[1]), 0] * (255 / 16))
            assert np.abs(pixels_of(sheet[shown]).astype(float) - expected).max() <= 1
            assert (sheet[shown]["width"], sheet[shown]["image-rendering"]) == ("8", "pixelated")


def test_each_picture_is_in_the_file_once_however_often_it_is_shown(finished: RunBuilder) -> None:
    finished.variant("mucs__forget_weight-0.5", finished.score * 2, forget_weight=0.5)
    page = Page(make_report(finished.run, k=4))
    shown = [target for _, target in pictures(page)]
    ids = [image["id"] for image in page.all("image")]
    assert len(ids) == len(set(ids)) and set(ids) == set(shown)
    assert len(shown) > 2 * len(ids)
    assert page.source.count("base64,") == len(ids)


def test_without_images_no_picture_is_on_the_page_or_beside_it(finished: RunBuilder) -> None:
    finished.evaluation("overlap", charts={"bars": LINE_ART, "pairs": PHOTOGRAPH})
    path = make_report(finished.run, k=4)
    assert len(Page(path).all("image")) > 3 and (path.parent / "top.png").exists()
    make_report(finished.run, k=4, images=False)
    page = Page(path)
    assert not page.all("image") and not pictures(page) and not page.all("use")
    assert [image["alt"] for image in page.all("img")] == ["overlap: chart, bars; its numbers are in the table"]
    assert "1 chart with pictures left out" in page.text
    assert "base64,iVBOR" not in page.source  # PNG
    best = int(finished.score[0].argmax())
    assert f"{finished.score[0, best]:+.4f} id {best} label {finished.label[best]} digits[{best}]" in page.text
    assert [file.name for file in path.parent.iterdir() if file.suffix == ".png"] == []
    assert list(read_json(path.parent / "manifest.json")["outputs"]) == ["index.html"]


def test_scores_labels_files_and_run_facts_are_on_the_page(finished: RunBuilder) -> None:
    text = Page(make_report(finished.run, k=4)).text
    best = int(finished.score[0].argmax())
    assert f"1 {finished.score[0, best]:+.4f} id {best} label {finished.label[best]} digits[{best}]" in text
    for fact in (
        "UCI Machine Learning Repository",
        "CC BY 4.0",
        "arXiv 2605.17938",
        "bound 1.0078 (closed form)",
        "training.learning_rate 0.001",
        "noise_bank.num_draws 100",
        str(read_json(finished.run / "data" / "manifest.json")["fingerprint"]),
        str(require_manifest(finished.run / "score" / "mucs", "score")["outputs"]["scores.safetensors"]["sha256"]),
        "torch",
        "How to read it",
        "no proof that anything was copied",
        "32 unlearning steps, bound reached",
    ):
        assert fact in text, fact


def test_the_histograms_bars_count_every_score_and_mark_the_top(finished: RunBuilder) -> None:
    page = Page(make_report(finished.run, k=4))
    plots = [svg["aria-label"] or "" for svg in page.all("svg") if svg.get("class") == "plot"]
    fourth = np.sort(finished.score[0])[-4]
    assert plots[0].startswith("Histogram of 60 scores from ")
    assert plots[0].endswith(f"the top 4 begin at {fourth:+.4f}.")
    assert [path.get("class") for path in page.all("path")].count("mark") == 3 * 4
    assert len(plots) == 3 + 1
    assert plots[-1].startswith("Training loss over 3,000 steps")


def test_hostile_names_and_labels_are_text_only(finished: RunBuilder) -> None:
    hostile = '"><script>alert(1)</script><img src=x onerror=alert(2)>'
    finished.files = [f"{hostile}{i}" for i in range(60)]
    for name in ("manifest.json", "index.csv"):
        (finished.run / "data" / name).unlink()
    finished.data(label=["</style><b onclick=alert(3)>&amp;"] * 60)
    page = Page(make_report(finished.run, k=3))
    assert f"{hostile}{int(finished.score[0].argmax())}" in page.text
    assert "label </style><b onclick=alert(3)>&amp;" in page.text
    assert not page.all("script") and not any(b.keys() for b in page.all("b"))
    assert not page.all("img")
    assert all((image["href"] or "").startswith("data:image/png;base64,") for image in page.all("image"))
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]


def test_the_page_loads_nothing_and_its_policy_names_its_own_style(finished: RunBuilder) -> None:
    page = Page(make_report(finished.run, k=3))
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    style = re.findall(r"<style>(.*?)</style>", page.source, re.DOTALL)
    assert len(style) == 1
    digest = base64.b64encode(hashlib.sha256(style[0].encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    assert not [a for _, a in page.elements if "style" in a]
    assert not page.all("link") and not page.all("script")
    assert all((a["href"] or "").startswith("#") for a in page.all("a"))


def test_every_link_has_its_target_and_no_id_is_used_twice(finished: RunBuilder) -> None:
    page = Page(make_report(finished.run, k=3))
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert {(a["href"] or "")[1:] for a in page.all("a")} <= set(ids)
    assert {a["aria-labelledby"] for _, a in page.elements if "aria-labelledby" in a} <= set(ids)


def test_exact_copies_are_marked_or_left_out(finished: RunBuilder) -> None:
    marked = Page(make_report(finished.run, k=3))
    assert [a.get("class") for a in marked.all("li")].count("copy") == 1
    assert "id 3 label 3 exact copy" in marked.text
    without = Page(make_report(finished.run, k=3, exclude_exact=True))
    assert "copy" not in [a.get("class") for a in without.all("li")]
    assert "Training image 3, rank 1" not in tiles(without)
    assert "exact copies in the training data 1" in without.text


def test_k_larger_than_the_images_scored_names_the_key(finished: RunBuilder) -> None:
    with pytest.raises(UserError, match=r"^report\.k: got 61; expected at most 60"):
        make_report(finished.run, k=61)
    assert not (finished.run / "report").exists()


def test_it_is_written_again_only_when_its_inputs_change(finished: RunBuilder, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(report.log, "info", lambda message, *arguments: said.append(message % arguments))
    path = make_report(finished.run, k=3)
    before = path.read_bytes(), (path.parent / "top.png").read_bytes(), (path.parent / "manifest.json").read_bytes()
    make_report(finished.run, k=3)
    assert said[-1].startswith("report: up to date")
    assert before[2] == (path.parent / "manifest.json").read_bytes()
    finished.variant("mucs__forget_weight-0.5", finished.score * 2, forget_weight=0.5)
    make_report(finished.run, k=3)
    assert not said[-1].startswith("report: up to date")
    assert "mucs__forget_weight-0.5" in Page(path).text
    assert read_json(path.parent / "manifest.json")["variants"] == ["mucs", "mucs__forget_weight-0.5"]
    assert len(said) == 3


def test_a_damaged_report_is_written_again(finished: RunBuilder) -> None:
    path = make_report(finished.run, k=3)
    page, picture = path.read_bytes(), (path.parent / "top.png").read_bytes()
    path.write_text("half a page")
    (path.parent / "top.png").unlink()
    make_report(finished.run, k=3)
    assert (path.read_bytes(), (path.parent / "top.png").read_bytes()) == (page, picture)


def test_variants_stand_side_by_side_with_what_differs(finished: RunBuilder) -> None:
    reversed_scores = finished.score.copy()
    reversed_scores[:] = -reversed_scores
    finished.variant("mucs__forget_weight-0.5", reversed_scores, forget_weight=0.5, unreached=[1])
    text = Page(make_report(finished.run, k=3)).text
    assert "mucs unlearning.\u200bforget_weight 0.2 31 (30 to 32) 3 of 3" in text
    row = text.split("mucs__forget_weight-0.5 unlearning.\u200bforget_weight 0.5 32 (30 to 1000) 2 of 3")[1]
    assert row.split("Groups over all")[0].split()[-4:] == ["0.0", "of", "3", "-1.000"]
    assert "1,000 unlearning steps did not reach the bound" in text
    assert [a.get("class") for a in Page(finished.run / "report" / "index.html").all("section")].count("answer") == 6


def test_an_unfinished_variant_is_left_out_and_named(finished: RunBuilder) -> None:
    (finished.run / "score" / "half").mkdir()
    assert "their scoring has not finished: half." in Page(make_report(finished.run, k=3)).text


def test_images_are_enough_without_training_or_unlearning_records(finished: RunBuilder) -> None:
    for folder in ("train", "unlearn/mucs"):
        (finished.run / folder / "manifest.json").unlink()
    (finished.run / "train" / "metrics.csv").unlink()
    page = Page(make_report(finished.run, k=3))
    assert "no record of unlearning in this run" in page.text
    assert "Training of the base model" not in page.text


def test_a_method_that_does_not_unlearn_says_so(make_run: Callable[..., RunBuilder]) -> None:
    run = make_run()
    run.data()
    run.sample()
    run.variant("trak", unlearns=False)
    assert "trak: its method does not unlearn" in Page(make_report(run.run, k=3)).text


def test_queries_that_are_not_scored_yet_are_named(finished: RunBuilder) -> None:
    assert "Not scored yet" not in Page(make_report(finished.run, k=3)).text
    finished.variant("mucs__forget_weight-0.5", finished.score[:1], forget_weight=0.5)
    page = Page(make_report(finished.run, k=3))
    assert "Not scored yet: queries 1, 2 by mucs__forget_weight-0.5." in page.text
    assert [a.get("class") for a in page.all("section")].count("answer") == 4


def test_a_query_from_a_file_stands_with_its_name_and_metadata(finished: RunBuilder) -> None:
    make_report(finished.run, k=3)
    (finished.run / "sample" / "manifest.json").unlink()
    finished.sample(files=["a.png", "b <b>.png", "c.png"])
    assert "file : b <b>.png prompt : prompt of b <b>.png" in page_words(make_report(finished.run, k=3))


def page_words(path: Path) -> str:
    """The text of a page; a term stands apart from its value by a colon, which the style sheet adds."""
    source = re.sub(r"</dt>\s*<dd>", " : ", path.read_text(encoding="utf-8"))
    text = re.sub(r"<style>.*?</style>|<[^>]*>", " ", source, flags=re.DOTALL)
    return " ".join(html.unescape(text).split())


def test_groups_stand_below_each_query_and_over_all(make_run: Callable[..., RunBuilder]) -> None:
    run = make_run()
    hand = np.where(run.label == 5, "right <b>", np.where(run.label == 4, "left", ""))
    run.data(metadata={"hand": list(hand)})
    run.sample()
    run.variant()
    page = Page(make_report(run.run, k=3, group_k=6))
    top = np.argsort(-run.score, axis=1, kind="stable")[:, :6]
    shares = {name: (hand[top] == name).mean(axis=1) for name in ("left", "right <b>", "")}
    overall = page.text.split("By hand")[1].split("Generated images and their")[0]
    for name, share in shares.items():
        count = int((hand == name).sum())
        assert f"{name or '(none)'} {count} {100 * count / 60:.1f} % {100 * share.mean():.1f} %" in overall
        for query in range(3):
            part = page.text.split(f"Query {query} ")[1].split("Query")[0].split("share of top 6")[2]
            own = run.score[query][hand == name]
            numbers = [own.mean(), own.max(), np.sort(own)[-6:].mean()]
            said = " ".join(f"{number:+.4f}" for number in numbers)
            assert f"{name or '(none)'} {count} {said} {100 * count / 60:.1f} % {100 * share[query]:.1f} %" in part
    assert shares["left"].max() > 0  # the queries are not all alike
    bars = [svg for svg in page.all("svg") if svg.get("class") == "share"]
    assert len(bars) == (1 + 3) * (10 + 3)
    assert all(svg["aria-hidden"] == "true" for svg in bars)


def test_only_the_columns_asked_for_are_summed_up(make_run: Callable[..., RunBuilder]) -> None:
    run = make_run()
    run.data(metadata={"artist": [f"artist {i % 15:02}" for i in range(60)], "caption": [str(i) for i in range(60)]})
    run.sample()
    run.variant()
    default = Page(make_report(run.run, k=3)).text
    assert "By label" in default and "By artist" in default and "By caption" not in default
    assert default.count("and 5 more groups") == 1 + 3
    none = Page(make_report(run.run, k=3, group_by=[]))
    assert "Groups over all" not in none.text and "#groups" not in [a["href"] for a in none.all("a")]
    assert "sum the scores up by group" not in none.text
    caption = Page(make_report(run.run, k=3, group_by=["caption"])).text
    assert "By caption" in caption and "By label" not in caption and "and 50 more groups" in caption
    with pytest.raises(UserError, match=r"^report\.group_by: got 'captions'; expected one of label, artist, caption"):
        make_report(run.run, k=3, group_by=["captions"])


def test_cleaned_images_are_decoded_again(make_run: Callable[..., RunBuilder]) -> None:
    run = make_run()
    dataset = load_dataset(DigitsConfig(limit=60, seed=0), run.run)
    run.sample()
    run.variant(dataset=dataset.fingerprint)
    (run.run / "data" / "images.safetensors").unlink()
    page = Page(make_report(run.run, data=DigitsConfig(limit=60, seed=0), k=3))
    assert len(tiles(page)) == 3 * 4
    assert "id 3 label 3 exact copy" in page.text
    assert "CC BY 4.0" in page.text


def test_the_picture_shows_each_query_beside_its_first_image(finished: RunBuilder) -> None:
    make_report(finished.run, k=3)
    picture = np.asarray(Image.open(finished.run / "report" / "top.png").convert("RGB"))
    top = HEADER + 2 * ROW  # query 2 and its exact copy look the same
    query = picture[top : top + TILE, MARGIN : MARGIN + TILE]
    assert query.std() > 50
    columns = [
        x
        for x in range(MARGIN + TILE, picture.shape[1] - TILE)
        if np.array_equal(picture[top : top + TILE, x : x + TILE], query)
    ]
    assert len(columns) == 1
    assert tuple(picture[top - 4, MARGIN]) == tuple(int(BLUE[i : i + 2], 16) for i in (1, 3, 5))
