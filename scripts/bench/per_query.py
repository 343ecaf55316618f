"""What a query costs, from its picture to its ranking: MUCS as in the paper against the fast setting.

The paper's: every image under every draw of the bank. The fast one: speed=fast. Each unlearns and scores the first
query in one command, which pays for the base model's losses as well, and all others in another; both times include the
start of the command. Prints one JSON object on stdout, a table on stderr.

    python scripts/bench/per_query.py [--data digits|photos|patches|crops] [--queries 10] [--draws 100] [--k K]
        [--folder outputs/bench]
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
from bench_runs import CUTS, agreement, make_run, mucs, scores_of, variants
from printing import print_result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", choices=("digits", *CUTS))
    parser.add_argument("--queries", type=int, default=10, help="at least 2")
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--k", type=int, help="places that the fast setting settles (default: score.top_k's)")
    parser.add_argument("--folder", type=Path, default=Path("outputs/bench"))
    arguments = parser.parse_args()
    source = arguments.folder / f"{arguments.data}-{arguments.queries}"
    make_run(arguments.data, source, arguments.queries)
    runs, first, others = {}, {}, {}
    settings = {
        "faithful": ["speed=faithful"],
        "fast": ["speed=fast", *([] if arguments.k is None else [f"score.top_k={arguments.k}"])],
    }
    for name, keys in settings.items():
        runs[name] = arguments.folder / f"{source.name}-{name}"
        shutil.rmtree(runs[name], ignore_errors=True)
        shutil.copytree(source, runs[name], ignore=shutil.ignore_patterns("unlearn", "score", "evaluate", "report"))
        command = ["run", f"run={runs[name]}", "device=cpu", f"noise_bank.num_draws={arguments.draws}", *keys]
        first[name] = mucs(*command, "stages=[unlearn,score]", "queries.index=0").seconds
        others[name] = mucs(*command, "stages=[unlearn,score]").seconds
    (exact, _), (fast, manifest) = (scores_of(run, *variants(run)) for run in runs.values())
    recall, _ = agreement(exact["score"], fast["score"], manifest["top_k"])
    mean = {name: (first[name] + others[name]) / arguments.queries for name in settings}
    print_result(
        {
            "benchmark": "per_query",
            "data": arguments.data,
            "images": exact["score"].shape[1],
            "draws": arguments.draws,
            "queries": arguments.queries,
            "k": manifest["top_k"],
            **{f"{name}_first_query_seconds": round(value, 1) for name, value in first.items()},
            **{
                f"{name}_next_query_seconds": round(value / (arguments.queries - 1), 1)
                for name, value in others.items()
            },
            **{f"{name}_seconds_a_query": round(value, 1) for name, value in mean.items()},
            "ratio": round(mean["faithful"] / mean["fast"], 2),
            "recall_at_k": round(float(np.mean(recall)), 4),
        }
    )


if __name__ == "__main__":
    main()
