"""``mucs show``: a query's top training images on stdout."""

import sys
from pathlib import Path

from mucs_cli.config import ShowConfig
from mucs_cli.reporting.results import RunResults, Variant
from mucs_cli.reporting.terminal import print_csv, print_json, print_summary, print_tables
from mucs_cli.stages.context import Context


def run(context: Context) -> None:
    """Prints the rankings that the configuration asks for, and nothing else on stdout."""
    config = context.config
    assert isinstance(config, ShowConfig)
    results = RunResults(context.run)
    variant = results.pick_variant(config.variant)
    queries = variant.query_ids if config.query is None else [config.query]
    rankings = {
        query: results.ranking(variant, query, config.k, bottom=config.bottom, exclude_exact=config.exclude_exact)
        for query in queries
    }
    if config.format == "json":
        facts = {"run": str(context.run), "variant": variant.name, "num_scored": len(variant.example_ids)}
        print_json(rankings, facts, sys.stdout)
    elif config.format == "csv":
        print_csv(rankings, list(results.metadata(0)), sys.stdout)
    else:
        print_tables(rankings, heading(variant, config.k, config.bottom), sys.stdout)


def print_top(run: Path, name: str, k: int) -> None:
    """The top ``k`` training images of every query of one variant, as ``mucs run`` prints them at its end."""
    results = RunResults(run)
    variant = results.variant(name)
    rankings = {query: results.ranking(variant, query, k) for query in variant.query_ids}
    print_summary(rankings, heading(variant, k, bottom=False) + ": example_id (label) score", sys.stdout)


def heading(variant: Variant, k: int, bottom: bool) -> str:
    end = "lowest" if bottom else "highest"
    return f"{variant.name}: the {k} {end} of {len(variant.example_ids):,} scores"
