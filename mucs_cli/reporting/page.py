"""The HTML report: one file without scripts or network, rendered from a run's results.

Text from the run (file names, labels, configuration) reaches the page through Jinja's autoescaping only. The content
security policy allows data: images and the page's one style sheet, named by its hash, and nothing else.
"""

import base64
import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mucs_cli.errors import UserError
from mucs_cli.reporting.comparison import differing_keys, overlap, spearman, variant_config
from mucs_cli.reporting.facts import duration, fact_tables, stage_manifests, value_text
from mucs_cli.reporting.group_views import GroupTable, RunGroups, share_text
from mucs_cli.reporting.pictures import Thumbnail, thumbnail
from mucs_cli.reporting.plots import histogram, loss_curve
from mucs_cli.reporting.results import Ranked, RunResults, Variant, score_text

TEMPLATES = files("mucs_cli.reporting") / "templates"
TEMPLATE_FILES = ("report.html.j2", "report.css")


@dataclass(frozen=True)
class Tile:
    """A training image in a ranking."""

    item: Ranked
    picture: Thumbnail


@dataclass(frozen=True)
class Row:
    """One variant's answer for one query."""

    variant: str
    tiles: list[Tile]
    histogram: Markup
    lowest: float
    median: float
    highest: float
    unlearning: dict[str, Any]
    groups: list[GroupTable]


@dataclass(frozen=True)
class QueryView:
    """A query and what each variant says of it."""

    query: int
    picture: Thumbnail
    facts: Sequence[tuple[str, str]]
    num_copies: int
    rows: list[Row]


@dataclass(frozen=True)
class VariantView:
    """One line of the table of variants; overlap and Spearman are means over the queries shared with the first."""

    name: str
    settings: list[str]
    steps: str
    reached: str
    unlearn_seconds: str
    score_seconds: str
    overlap: str
    spearman: str


def template_text() -> str:
    """The page's sources, which decide what a report looks like."""
    return "".join((TEMPLATES / name).read_text(encoding="utf-8") for name in TEMPLATE_FILES)


def render_report(
    results: RunResults,
    k: int,
    exclude_exact: bool,
    group_by: Sequence[str] | None = None,
    group_k: int | None = None,
) -> str:
    """The whole page.

    Args:
        results: a finished run.
        k: training images a query.
        exclude_exact: leave exact copies of a query out of its rankings and groups.
        group_by, group_k: see ``RunGroups``.

    Raises:
        UserError: ``k`` or ``group_k`` is more than there is to rank, there is no such column, or a file of the run is
            damaged.
    """
    style = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    environment = Environment(
        loader=PackageLoader("mucs_cli.reporting", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"score": score_text, "value": value_text, "duration": duration, "share": share_text}
    variants = results.variants
    configs = [variant_config(variant) for variant in variants]
    differing = differing_keys(configs)
    groups = RunGroups(results, group_by, group_k, exclude_exact)
    thumbnails: dict[int, Thumbnail] = {}
    return environment.get_template("report.html.j2").render(
        style=Markup(style),
        style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        run=results.run.name,
        k=k,
        exclude_exact=exclude_exact,
        data_facts=results.data.get("facts", {}),
        headline=headline(results, configs[0]),
        unfinished=results.unfinished,
        unscored=[(variant.name, missing) for variant in variants if (missing := results.unscored(variant))],
        variants=variants,
        differing=differing,
        summary=[
            variant_view(results, variant, config, differing, k, exclude_exact)
            for variant, config in zip(variants, configs, strict=True)
        ],
        group_k=groups.k,
        overall_groups=groups.overall(),
        queries=[query_view(results, query, k, exclude_exact, groups, thumbnails) for query in all_queries(variants)],
        curve=training_curve(results.run / "train" / "metrics.csv"),
        tables=fact_tables(results),
    )


def all_queries(variants: Sequence[Variant]) -> list[int]:
    return sorted({query for variant in variants for query in variant.query_ids})


def headline(results: RunResults, config: dict[str, Any]) -> list[tuple[str, str]]:
    """The few numbers at the top of the page."""
    seconds = [manifest.get("seconds") or 0 for manifest in stage_manifests(results).values()]
    first = results.variants[0]
    found = [
        ("generated images", value_text(len(all_queries(results.variants)))),
        ("training images scored", value_text(len(first.example_ids))),
        ("noise draws an image", value_text(config.get("noise_bank.num_draws"))),
        (
            "variants" if len(results.variants) > 1 else "variant",
            value_text([v.name for v in results.variants])
            if len(results.variants) == 1
            else str(len(results.variants)),
        ),
        ("computing time", duration(sum(seconds))),
    ]
    return found


def query_view(
    results: RunResults,
    query: int,
    k: int,
    exclude_exact: bool,
    groups: RunGroups,
    thumbnails: dict[int, Thumbnail],
) -> QueryView:
    rows = []
    for variant in results.variants:
        if query not in variant.query_ids:
            continue
        ranked = results.ranking(variant, query, k, exclude_exact=exclude_exact, key="report.k")
        for item in ranked:
            if item.example_id not in thumbnails:
                thumbnails[item.example_id] = thumbnail(results.training_image(item.example_id))
        scores = variant.scores_of(query)
        rows.append(
            Row(
                variant.name,
                [Tile(item, thumbnails[item.example_id]) for item in ranked],
                histogram(scores, [item.score for item in ranked]),
                float(scores.min()),
                float(np.median(scores)),
                float(scores.max()),
                variant.unlearning_of(query),
                groups.of_query(variant.name, query),
            )
        )
    file = results.query_file(query)
    facts = [] if file is None else [("file", file)]
    facts += [(name, value) for name, value in results.query_metadata(query).items() if value]
    facts += [
        (name, value_text(results.samples[name][query].tolist()))
        for name in ("condition", "seed")
        if name in results.samples
    ]
    copies = len(results.exact_copies[query])
    return QueryView(query, thumbnail(results.queries[query]), facts, copies, rows)


def variant_view(
    results: RunResults, variant: Variant, config: dict[str, Any], differing: list[str], k: int, exclude_exact: bool
) -> VariantView:
    records = variant.unlearn.get("results", [])
    steps = [record["num_steps"] for record in records if record.get("num_steps") is not None]
    reached = [record["reached_bound"] for record in records if record.get("reached_bound") is not None]
    first = results.variants[0]
    shared = [query for query in variant.query_ids if query in first.query_ids]
    overlaps, correlations = [], []
    for query in shared if variant is not first else []:
        ours, theirs = (
            results.ranking(v, query, k, exclude_exact=exclude_exact, key="report.k") for v in (variant, first)
        )
        overlaps.append(overlap(ours, theirs))
        correlations.append(spearman(first, variant, query))
    defined = [value for value in correlations if value is not None]
    return VariantView(
        name=variant.name,
        settings=[value_text(config.get(key)) for key in differing],
        steps=f"{median(steps):g} ({min(steps)} to {max(steps)})" if steps else "–",
        reached=f"{sum(reached)} of {len(reached)}" if reached else "–",
        unlearn_seconds=duration(variant.unlearn.get("seconds")),
        score_seconds=duration(variant.manifest.get("seconds")),
        overlap=f"{np.mean(overlaps):.1f} of {k}" if overlaps else "–",
        spearman=f"{np.mean(defined):.3f}" if defined else "–",
    )


def training_curve(path: Path) -> Markup | None:
    """The plot of ``train/metrics.csv``; None for a model that was not trained here, or too few points for a curve.

    Raises:
        UserError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        with path.open(newline="", encoding="utf-8") as file:
            points = [(float(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            str(path), f"cannot be read ({error!r}); expected columns step and loss. Rerun mucs train."
        ) from error
    points = [(step, loss) for step, loss in points if loss > 0]
    return loss_curve([step for step, _ in points], [loss for _, loss in points]) if len(points) > 1 else None
