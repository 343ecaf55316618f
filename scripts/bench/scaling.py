"""How scoring grows: time and peak memory with images N, queries Q and draws n doubled, and memory for large N.

On pictures of 8x8 pixels of noise, with a small model: what the scores are does not matter here. Each figure is a
`mucs score` of all queries of a run, in a process of its own; ratios are of the time beyond that of a command with one
draw, which has hardly anything to do, and of medians of three, in turn: many machines are slower once they have been
busy for a while. Prints one JSON object on stdout, a table on stderr.

    python scripts/bench/scaling.py [--images 10000 100000] [--mode exact|adaptive] [--repeats 3]
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from bench_runs import Cost, mucs, take_away
from PIL import Image
from printing import print_result

IMAGES, QUERIES, DRAWS = 4000, 2, 50
"""Before doubling."""
SIDE = 8
"""Of the pictures, pixels."""


def write_pictures(folder: Path, count: int) -> None:
    source = np.random.default_rng(0)
    for index in range(count):
        place = folder / f"{index // 1000:03d}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(source.integers(0, 256, (SIDE, SIDE), np.uint8)).save(place / f"{index:06d}.png")


def make_run(folder: Path, count: int, num_queries: int = QUERIES) -> Path:
    """A run on ``count`` pictures whose queries have been unlearned."""
    run, pictures = folder / f"run-{count}-{num_queries}", folder / f"pictures-{count}"
    if not pictures.exists():
        write_pictures(pictures, count)
    data = ["data=image_folder", f"data.path={pictures}", "data.holdout=0", "diffusion=edm_auto"]
    model = ["model=dit", "model.width=32", "model.num_layers=2", "model.num_heads=2", "training.num_steps=20"]
    queries = [f"queries.num={num_queries}", "sampler.num_steps=2", "unlearning.num_steps=2"]
    mucs("run", f"run={run}", "device=cpu", "stages=[train,sample,unlearn]", *data, *model, *queries)
    return run


def score(run: Path, draws: int, mode: str) -> Cost:
    """From nothing but the unlearned models."""
    take_away(run, "score")
    keys = ["device=cpu", f"noise_bank.num_draws={draws}", "unlearning.num_steps=2"]
    return mucs("score", f"run={run}", f"score.mode={mode}", "score.batch_size=512", *keys)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--images", type=int, nargs="*", default=[10_000, 100_000], help="data sets whose memory counts"
    )
    parser.add_argument("--mode", default="exact", choices=("exact", "adaptive"))
    parser.add_argument("--repeats", type=int, default=3, help="medians of so many; one is enough for memory")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "scaling", "mode": arguments.mode}
    with tempfile.TemporaryDirectory() as temporary:
        runs = {count: make_run(Path(temporary), count) for count in {IMAGES, 2 * IMAGES, *arguments.images}}
        more_queries = make_run(Path(temporary), IMAGES, 2 * QUERIES)
        cases = {
            "start": (runs[IMAGES], 1),
            "base": (runs[IMAGES], DRAWS),
            "images_doubled": (runs[2 * IMAGES], DRAWS),
            "queries_doubled": (more_queries, DRAWS),
            "draws_doubled": (runs[IMAGES], 2 * DRAWS),
        }
        costs: dict[str, list[Cost]] = {name: [] for name in cases}
        for _ in range(arguments.repeats):
            for name, (run, draws) in cases.items():
                costs[name].append(score(run, draws, arguments.mode))
        seconds = {name: statistics.median(cost.seconds for cost in of_case) for name, of_case in costs.items()}
        for name, of_case in costs.items():
            result[f"{name}_seconds"] = round(seconds[name], 2)
            if name != "start":
                result[f"{name}_ratio"] = round(
                    (seconds[name] - seconds["start"]) / (seconds["base"] - seconds["start"]), 2
                )
            result[f"{name}_peak_mib"] = round(max(cost.peak_mib for cost in of_case))
        for count in arguments.images:
            cost = score(runs[count], 4, arguments.mode)
            result[f"{count}_images_seconds"] = round(cost.seconds, 1)
            result[f"{count}_images_peak_mib"] = round(cost.peak_mib)
    print_result(result)


if __name__ == "__main__":
    main()
