"""Adaptive against exact scoring of the same unlearned models: evaluations, time, recall of the highest k, correlation.

An evaluation is an image under a draw through one model; the base model's are counted on both sides. Makes a run below
--folder (digits, or colour squares of two photographs), or goes on with the one that is there. Prints one JSON object
on stdout, a table on stderr.

    python scripts/bench/adaptive.py [--data digits|photos|patches|crops] [--queries 10] [--draws 100] [--k 36]
        [--folder FOLDER]
"""

import argparse
from pathlib import Path

import numpy as np
from bench_runs import CUTS, agreement, make_run, mucs, score, scores_of, take_away
from printing import print_result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", choices=("digits", *CUTS))
    parser.add_argument("--queries", type=int, default=10)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--k", type=int, help="places to settle (default: score.top_k's)")
    parser.add_argument("--confidence", type=float, default=0.99)
    parser.add_argument("--folder", type=Path, default=Path("outputs/bench"))
    parser.add_argument("--keys", nargs="*", default=[], help="keys of unlearning, noise_bank and method")
    arguments = parser.parse_args()
    run = arguments.folder / f"{arguments.data}-{arguments.queries}"
    make_run(arguments.data, run, arguments.queries)
    take_away(run, "unlearn", "score")
    shared = ["device=cpu", f"noise_bank.num_draws={arguments.draws}", *arguments.keys]
    unlearn_seconds = mucs("unlearn", f"run={run}", *shared).seconds
    race = ["score.mode=adaptive", f"score.confidence={arguments.confidence}"]
    race += [] if arguments.k is None else [f"score.top_k={arguments.k}"]
    adaptive_name, adaptive_cost = score(run, *shared, *race)
    exact_name, exact_cost = score(run, *shared)
    (exact, _), (adaptive, manifest) = scores_of(run, exact_name), scores_of(run, adaptive_name)
    k, draws = manifest["top_k"], adaptive["draws"]
    recall, correlation = agreement(exact["score"], adaptive["score"], k)
    num_queries, num_images = exact["score"].shape
    evaluations = {
        "exact": (num_queries + 1) * num_images * arguments.draws,
        "adaptive": int(draws.sum(dtype=np.int64) + draws.max(axis=0).sum(dtype=np.int64)),
    }
    whole = draws == arguments.draws
    print_result(
        {
            "benchmark": "adaptive",
            "data": arguments.data,
            "queries": num_queries,
            "images": num_images,
            "draws": arguments.draws,
            "k": k,
            "confidence": arguments.confidence,
            "exact_evaluations": evaluations["exact"],
            "adaptive_evaluations": evaluations["adaptive"],
            "evaluations_ratio": round(evaluations["adaptive"] / evaluations["exact"], 4),
            "exact_seconds": round(exact_cost.seconds, 1),
            "adaptive_seconds": round(adaptive_cost.seconds, 1),
            "seconds_ratio": round(adaptive_cost.seconds / exact_cost.seconds, 4),
            "unlearn_seconds": round(unlearn_seconds, 1),
            "recall_at_k": round(float(np.mean(recall)), 4),
            "lowest_recall_at_k": round(min(recall), 4),
            "spearman": round(float(np.mean(correlation)), 4),
            "largest_difference_of_survivors": float(np.abs(exact["score"] - adaptive["score"])[whole].max()),
            "queries_that_fell_back": sum(race["is_exact"] for race in manifest["races"].values()),
        }
    )


if __name__ == "__main__":
    main()
