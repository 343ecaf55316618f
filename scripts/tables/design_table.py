"""The table of MUCS's design study: what each choice does to unlearning and to the ranking, beside the default.

Reads the finished variants of method=mucs in a run, as design_choices.sh makes them. Prints Markdown on stdout and
writes <run>/tables/design_choices.csv. The arguments are those of the study: they name the run and its default.

    python scripts/tables/design_table.py [--k 10] [--learning-rate-times FACTOR] experiment=digits [KEY=VALUE ...]
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from mucs_cli.artifacts import write_text
from mucs_cli.composition import compose
from mucs_cli.config import SECTION_SCHEMAS
from mucs_cli.errors import UserError
from mucs_cli.reporting.comparison import overlap, spearman
from mucs_cli.reporting.results import RunResults, Variant
from mucs_cli.reporting.tables import Cell, Table, to_csv, to_markdown
from mucs_cli.schemas import NoiseBankConfig, UnlearningConfig
from mucs_cli.stage_folder import require_manifest
from mucs_cli.stages.context import Context

SECTIONS = {
    "unlearning": UnlearningConfig,
    "noise_bank": NoiseBankConfig,
    "method": SECTION_SCHEMAS["method"]["mucs"],
}
COLUMNS = (
    "choice",
    "updates",
    "bound_reached",
    "query_loss",
    "top_overlap",
    "spearman",
    "label_agreement",
    "unlearn_seconds",
    "score_seconds",
)


def context_of(overrides: Sequence[str]) -> Context:
    """The command that made the default variant.

    Raises:
        UserError: a value that cannot be, or no such run.
    """
    return Context.create("score", compose("score", list(overrides)), list(overrides), Path.cwd())


# --- the study's variants --------------------------------------------------------------------------------------------


def settings(variant: Variant) -> dict[str, Any]:
    """Dotted key -> value of everything that decides its scores, in the order of the schemas."""
    config = variant.manifest["config"]
    return {
        f"{section}.{entry.name}": config[section][entry.name]
        for section, schema in SECTIONS.items()
        for entry in fields(schema)
        if entry.name in config[section]
    }


def changes(variant: Variant, default: Variant) -> list[tuple[str, Any]]:
    """The keys whose values are not the default's, with the variant's values."""
    plain = settings(default)
    return [(key, value) for key, value in settings(variant).items() if value != plain[key]]


def ordered(variants: Sequence[Variant], default: Variant) -> Iterator[tuple[Variant, list[tuple[str, Any]]]]:
    """The default, then the others: by key in the order of the schemas, then by value."""
    place = {key: index for index, key in enumerate(settings(default))}

    def order(entry: tuple[Variant, list[tuple[str, Any]]]) -> Any:
        return [
            (place[key], isinstance(value, str), value if is_number(value) else str(value)) for key, value in entry[1]
        ]

    yield from sorted(((variant, changes(variant, default)) for variant in variants), key=order)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float)


# --- figures ---------------------------------------------------------------------------------------------------------


class Labels:
    """Classes of training images and of queries; ``known`` is false where the model knows none."""

    def __init__(self, results: RunResults):
        column, condition = results.data["label_column"], results.samples.get("condition")
        self.known = False
        if column is not None and condition is not None and condition.ndim == 1:
            number = {name: index for index, name in enumerate(results.data["class_names"])}
            self.of_images = np.array([number[row[column]] for row in results.index])
            self.of_queries = condition.numpy()
            self.known = True

    def agreement(self, query: int, example_ids: Sequence[int]) -> float:
        """The share of the images that are of the query's class."""
        return float((self.of_images[list(example_ids)] == self.of_queries[query]).mean())


def row_of(
    results: RunResults, variant: Variant, changed: list[tuple[str, Any]], default: Variant, labels: Labels, k: int
) -> tuple[Cell, ...]:
    """One line of the table; means are over the queries that both variants scored."""
    queries = [query for query in default.query_ids if query in variant.query_ids]
    tops = {query: results.ranking(variant, query, k) for query in queries}
    records = [record for record in variant.unlearn.get("results", []) if record["query"] in queries]
    reached = [record["reached_bound"] for record in records if record["reached_bound"] is not None]
    correlations = [value for query in queries if (value := spearman(default, variant, query)) is not None]
    agreements = [labels.agreement(q, [item.example_id for item in tops[q]]) for q in queries if labels.known]
    return (
        ", ".join(f"{key}={spelled(value)}" for key, value in changed) or "default",
        whole(median(record["num_steps"] for record in records)) if records else None,
        f"{sum(reached)} of {len(reached)}" if reached else "–",
        fmean(record["query_loss"] for record in records) if records else None,
        fmean(overlap(results.ranking(default, query, k), tops[query]) / k for query in queries),
        fmean(correlations) if correlations else None,
        fmean(agreements) if agreements else None,
        variant.unlearn.get("seconds"),
        variant.manifest["seconds"],
    )


def whole(value: float) -> float:
    """An integer where it is one."""
    return int(value) if value == int(value) else value


def spelled(value: Any) -> str:
    """A value as it is typed."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def design_table(results: RunResults, default: Variant, k: int) -> Table:
    """A row a finished variant of MUCS, the default first.

    Args:
        results: of the run.
        default: what every variant is compared with.
        k: how many of the highest scores are compared.
    """
    labels = Labels(results)
    studied = [variant for variant in results.variants if variant.manifest["config"]["method"]["name"] == "mucs"]
    rows = [row_of(results, variant, changed, default, labels, k) for variant, changed in ordered(studied, default)]
    count = len(default.example_ids)
    title = (
        f"{len(default.query_ids)} queries, {count} training images; updates: median; query loss: mean after "
        f"unlearning; top overlap (of the {k} highest; of random sets {k / count:.3f}) and Spearman (of queries whose "
        "scores are not all equal): mean, with the default"
    )
    if labels.known:
        chance = fmean(labels.agreement(query, default.example_ids.tolist()) for query in default.query_ids)
        title += f"; label agreement: share of the {k} highest that are of the query's class, by chance {chance:.3f}"
    return Table(title + ".", COLUMNS, rows)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description="table of the design study")
    parser.add_argument("--k", type=int, default=10, help="how many of the highest scores are compared")
    parser.add_argument(
        "--learning-rate-times", type=float, help="print this times the default's learning rate, and end"
    )
    parser.add_argument("overrides", nargs="*", help="as typed for the study")
    options = parser.parse_args(arguments)
    context = context_of(options.overrides)
    if options.learning_rate_times is not None:
        manifest = require_manifest(context.folder("unlearn", context.unlearn_variant()), "unlearn")
        print(f"{manifest['learning_rate'] * options.learning_rate_times:.3g}")
        return
    results = RunResults(context.run)
    table = design_table(results, results.variant(context.score_variant()), options.k)
    write_text(context.folder("tables", "design_choices.csv"), to_csv(table))
    print(to_markdown(table), end="")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"design_table: error: {error}")
