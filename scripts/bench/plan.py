"""What plan=true predicts for each stage, beside what the stage then takes: seconds and peak memory.

Trains, samples, unlearns and scores on scikit-learn's digits in a temporary folder, each stage as a process of its own,
first with plan=true, then for real. Ratios are measured over predicted; the goal is 1/1.5 to 1.5 for time and 1/1.3 to
1.3 for memory. Prints one JSON object on stdout, a table on stderr.

    python scripts/bench/plan.py [--steps 1500] [--queries 8] [--draws 50] [KEY=VALUE ...]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_runs import mucs
from printing import print_result

PLAN = """
import json, sys
from mucs_cli import cli
from mucs_cli.stages import plan

def print_plan(context, plans):
    memory = max(part.memory or 0 for part in plans)
    print(json.dumps({"seconds": sum(part.seconds for part in plans), "mib": memory / 2**20}))

plan.print_plan = print_plan
sys.exit(cli.main(sys.argv[1:]))
"""
TIME_GOAL, MEMORY_GOAL = 1.5, 1.3


def predicted(arguments: list[str]) -> dict[str, float]:
    """Seconds and MiB that the command announces."""
    command = [sys.executable, "-c", PLAN, *arguments, "plan=true"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def compare(arguments: list[str]) -> dict[str, Any]:
    """What is predicted, what is measured, and the ratio of the two."""
    before, cost = predicted(arguments), mucs(*arguments)
    after = {"seconds": cost.seconds, "mib": cost.peak_mib}
    return {
        "predicted": {name: round(value, 1) for name, value in before.items()},
        "measured": {name: round(value, 1) for name, value in after.items()},
        "ratio": {name: round(after[name] / before[name], 2) for name in before},
    }


def is_within(ratio: float, goal: float) -> bool:
    return 1 / goal <= ratio <= goal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500, help="updates of training")
    parser.add_argument("--queries", type=int, default=8, help="sampled queries")
    parser.add_argument("--draws", type=int, default=50, help="noise draws of scoring")
    parser.add_argument("more", nargs="*", help="further keys of mucs train, for example model.size=small")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = f"run={Path(folder) / 'digits'}"
        training = ["experiment=digits", f"training.num_steps={arguments.steps}", *arguments.more]
        stages = {
            "train": ["train", run, *training],
            "sample": ["sample", run, f"queries.num={arguments.queries}"],
            "unlearn": ["unlearn", run],
            "score": ["score", run, f"noise_bank.num_draws={arguments.draws}"],
            "score, method=trak": ["score", run, "method=trak"],
            "score, method=pixel": ["score", run, "method=pixel"],
        }
        result = {name: compare(command) for name, command in stages.items()}
    ratios = [stage["ratio"] for stage in result.values()]
    within = {
        f"time within {TIME_GOAL}": all(is_within(ratio["seconds"], TIME_GOAL) for ratio in ratios),
        f"memory within {MEMORY_GOAL}": all(is_within(ratio["mib"], MEMORY_GOAL) for ratio in ratios),
    }
    print_result({"benchmark": "plan", **result, **within})


if __name__ == "__main__":
    main()
