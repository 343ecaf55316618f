"""``mucs show``: a query's top training images, or its groups of them, on stdout."""

import sys
from pathlib import Path

from mucs_cli.config import ShowConfig
from mucs_cli.errors import UserError
from mucs_cli.reporting import terminal
from mucs_cli.reporting.group_views import columns_of, query_groups
from mucs_cli.reporting.groups import choose_groupings, choose_k
from mucs_cli.reporting.results import RunResults, Variant
from mucs_cli.stages.context import Context


def run(context: Context) -> None:
    """Prints the rankings or groups that the configuration asks for, and nothing else on stdout."""
    config = context.config
    assert isinstance(config, ShowConfig)
    check(config)
    results = RunResults(context.run)
    variant = results.pick_variant(config.variant)
    queries = variant.query_ids if config.query is None else [config.query]
    if config.group_by is None:
        show_rankings(results, variant, queries, config)
    else:
        show_groups(results, variant, queries, config, config.group_by)


def check(config: ShowConfig) -> None:
    """Raises UserError for keys that exclude each other."""
    if config.group_by is None and config.group_k is not None:
        raise UserError("group_k", f"got {config.group_k} without group_by. Add group_by=COLUMN, or leave it out.")
    if config.group_by is not None and config.bottom:
        raise UserError("bottom", "got true with group_by, which sums up the highest scores. Leave one of the two out.")


def show_rankings(results: RunResults, variant: Variant, queries: list[int], config: ShowConfig) -> None:
    rankings = {
        query: results.ranking(variant, query, config.k, bottom=config.bottom, exclude_exact=config.exclude_exact)
        for query in queries
    }
    described = terminal.describe(results, queries)
    if config.format == "json":
        terminal.print_json(rankings, described, facts(results, variant), sys.stdout)
    elif config.format == "csv":
        terminal.print_csv(rankings, list(results.metadata(0)), sys.stdout)
    else:
        terminal.print_tables(rankings, described, heading(variant, config.k, config.bottom), sys.stdout)


def show_groups(results: RunResults, variant: Variant, queries: list[int], config: ShowConfig, column: str) -> None:
    k = choose_k(config.group_k, len(variant.example_ids), "group_k")
    variant.require_settled(k, "group_k")
    grouping = choose_groupings([column], columns_of(results, variant), "group_by")[column]
    groups = {query: query_groups(results, variant, query, grouping, k, config.exclude_exact) for query in queries}
    described = terminal.describe(results, queries)
    if config.format == "json":
        about = {**facts(results, variant), "group_by": column, "group_k": k}
        terminal.print_groups_json(groups, described, about, sys.stdout)
    elif config.format == "csv":
        terminal.print_groups_csv(groups, column, sys.stdout)
    else:
        title = f"{variant.name}: {len(variant.example_ids):,} scores by {column}"
        terminal.print_group_tables(groups, described, column, k, config.k, title, sys.stdout)


def facts(results: RunResults, variant: Variant) -> dict[str, object]:
    """What every JSON output says first."""
    return {"run": str(results.run), "variant": variant.name, "num_scored": len(variant.example_ids)}


def print_top(run: Path, name: str, k: int) -> None:
    """The top ``k`` training images (or those settled) of every query of a variant, as ``mucs run`` prints them."""
    results = RunResults(run)
    variant = results.variant(name)
    k = min(k, variant.num_settled or k)
    rankings = {query: results.ranking(variant, query, k) for query in variant.query_ids}
    terminal.print_summary(rankings, heading(variant, k, bottom=False) + ": example_id (label) score", sys.stdout)


def heading(variant: Variant, k: int, bottom: bool) -> str:
    end = "lowest" if bottom else "highest"
    return f"{variant.name}: the {k} {end} of {len(variant.example_ids):,} scores"
