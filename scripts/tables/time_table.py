"""The table of time.sh: seconds that the stages of each method took, and minutes a query.

Reads the manifests below <folder>/methods/*/; prints Markdown and writes <folder>/tables/time.csv.

    python scripts/tables/time_table.py outputs/time
"""

import sys
from pathlib import Path

from mucs_cli.artifacts import write_text
from mucs_cli.errors import UserError
from mucs_cli.records import read_json
from mucs_cli.reporting.tables import Cell, Table, to_csv, to_markdown


def rows_of(folder: Path) -> list[tuple[Cell, ...]]:
    """method, queries, seconds of unlearning, of scoring with all that it needs, minutes a query; fastest first."""
    rows: list[tuple[Cell, ...]] = []
    for path in sorted(folder.glob("methods/*/score/*/manifest.json")):
        run, score = path.parents[2], read_json(path)
        if path.parent.name.startswith("_"):
            continue
        seconds = [read_json(file)["seconds"] for file in run.glob("unlearn/[!_]*/manifest.json")]
        unlearn, queries = sum(seconds), len(score["queries"])
        total = unlearn + score["seconds"]
        rows.append((path.parent.name, queries, float(unlearn), float(score["seconds"]), total / queries / 60))
    return sorted(rows, key=lambda row: row[-1])  # type: ignore[arg-type,return-value]


def main(folder: Path) -> None:
    rows = rows_of(folder)
    if not rows:
        raise UserError(str(folder), "has no finished scores. Run scripts/tables/time.sh first.")
    columns = ("method", "queries", "unlearn_seconds", "score_seconds", "minutes_a_query")
    table = Table("time of each method from scratch, base model and queries given", columns, rows)
    write_text(folder / "tables" / "time.csv", to_csv(table))
    print(to_markdown(table), end="")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except UserError as error:
        sys.exit(f"time_table: error: {error}")
