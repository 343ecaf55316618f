"""The HTML report: one file without scripts or network, rendered from a run's results.

Text from the run (file names, labels, configuration) reaches the page through Jinja's autoescaping only. The content
security policy allows data: images and the page's one style sheet, named by its hash, and nothing else.
"""

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray

from mucs_cli.artifacts import check_file
from mucs_cli.errors import UserError
from mucs_cli.methods import METHODS
from mucs_cli.reporting.comparison import differing_settings, variant_config, variant_view
from mucs_cli.reporting.csv_rows import read_rows
from mucs_cli.reporting.ensembles import ensemble_views
from mucs_cli.reporting.evaluations import evaluation_views
from mucs_cli.reporting.facts import duration, fact_tables, identity, run_versions, stage_manifests, value_text
from mucs_cli.reporting.group_views import RunGroups, share_text
from mucs_cli.reporting.pictures import PictureKey, thumbnails
from mucs_cli.reporting.plots import loss_curve
from mucs_cli.reporting.query_views import query_view
from mucs_cli.reporting.results import RunResults, Variant, score_text
from mucs_cli.schemas import ReportConfig

TEMPLATES = files("mucs_cli.reporting") / "templates"
TEMPLATE_FILES = ("report.html.j2", "report.css")


def template_text() -> str:
    """The page's sources, which decide what a report looks like."""
    return "".join((TEMPLATES / name).read_text(encoding="utf-8") for name in TEMPLATE_FILES)


def render_report(results: RunResults, settings: ReportConfig) -> str:
    """The whole page.

    Args:
        results: a finished run.
        settings: what is shown; see the schema.

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
    methods = dict.fromkeys(config.get("method.name") for config in configs)
    groups = RunGroups(results, settings.group_by, settings.group_k, settings.exclude_exact)
    queries = [query_view(results, query, settings, groups) for query in all_queries(variants)]

    def image_of(key: PictureKey) -> NDArray[np.float32]:
        kind, number = key
        return results.queries[number] if kind == "query" else results.training_image(number)

    keys = [key for view in queries for key in view.pictures()] if settings.images else []
    pictures, encoding = thumbnails(keys, image_of)
    return environment.get_template("report.html.j2").render(
        style=Markup(style),
        style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        run=results.run.name,
        k=settings.k,
        exclude_exact=settings.exclude_exact,
        images=settings.images,
        pictures=pictures,
        encoding=encoding,
        reduced=bool(pictures) and max(results.images.shape[2:]) > encoding.side,
        data_facts=results.data.get("facts", {}),
        headline=headline(results, configs),
        unfinished=results.unfinished,
        unfinished_evaluations=results.unfinished_evaluations,
        unscored=[(variant.name, missing) for variant in variants if (missing := results.unscored(variant))],
        variants=variants,
        methods={name: METHODS[name].summary for name in methods if name in METHODS},
        summary=[
            variant_view(results, variant, differing, settings.k, settings.exclude_exact)
            for variant, differing in zip(variants, differing_settings(configs), strict=True)
        ],
        ensembles=ensemble_views(results),
        evaluations=evaluation_views(results, settings.images),
        group_k=groups.k,
        overall_groups=groups.overall(),
        queries=queries,
        curve=training_curve(results),
        tables=fact_tables(results),
        identity=identity(results),
        versions=run_versions(results),
        scored_on=max(str(variant.manifest.get("ended", "–"))[:10] for variant in variants),
    )


def all_queries(variants: Sequence[Variant]) -> list[int]:
    return sorted({query for variant in variants for query in variant.query_ids})


def headline(results: RunResults, configs: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """The few numbers at the top of the page."""
    seconds = [manifest.get("seconds") or 0 for manifest in stage_manifests(results).values()]
    first = results.variants[0]
    draws = list(dict.fromkeys(c["noise_bank.num_draws"] for c in configs if "noise_bank.num_draws" in c))
    up_to = "up to " if any(variant.num_settled for variant in results.variants) else ""
    queries = all_queries(results.variants)
    held_out = sum(map(results.is_held_out, queries))
    found = [
        ("generated images", value_text(len(queries) - held_out)),
        *([("held-out images", value_text(held_out))] if held_out else []),
        ("training images scored", value_text(len(first.example_ids))),
        ("noise draws an image", up_to + value_text(draws[0] if len(draws) == 1 else draws)),
        (
            "variants" if len(results.variants) > 1 else "variant",
            value_text([v.name for v in results.variants])
            if len(results.variants) == 1
            else str(len(results.variants)),
        ),
        ("computing time", duration(sum(seconds))),
    ]
    return found


def training_curve(results: RunResults) -> Markup | None:
    """The plot of ``train/metrics.csv``; None for a model that was not trained here, or too few points for a curve.

    Raises:
        UserError: the file is damaged.
    """
    path = results.run / "train" / "metrics.csv"
    if path.name not in results.train.get("outputs", {}):
        return None
    check_file(path.parent, results.train, path.name)
    try:
        points = [(float(row["step"]), float(row["loss"])) for row in read_rows(path, "train")]
    except (ValueError, KeyError) as error:
        raise UserError(
            str(path), f"cannot be read ({error!r}); expected columns step and loss. Rerun mucs train."
        ) from error
    points = [(step, loss) for step, loss in points if loss > 0]
    return loss_curve([step for step, _ in points], [loss for _, loss in points]) if len(points) > 1 else None
