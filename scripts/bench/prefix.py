"""Cost of scoring a query when the queries of a pass share the frozen part of the network, against one at a time.

The unlearned models differ from the base model in the last 1, 2, half or all blocks, as left by
unlearning.trainable=last_blocks. For each, all queries are scored in one pass; unshared is a pass a query, which costs
the same wherever they differ. All are timed in turn, three times; ratios are of the medians. Beside the time stands the
forward work, the floating-point operations that torch counts, which no other load on the machine changes. Both include
the forward pass of two images that finds the shared part, once a block of images: with so few images and draws it
weighs more than in a run. Prints one JSON object on stdout, a table on stderr.

    python scripts/bench/prefix.py [--model dit-tiny dit-384] [--queries 3] [--images 4] [--draws 4]
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from printing import print_result
from score_throughput import build
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mucs_cli.attribution.scoring import bank_losses
from mucs_cli.attribution.trainable import trainable_names
from mucs_cli.diffusion.denoiser import EDMDenoiser
from mucs_cli.diffusion.noise_bank import draw_noise_bank
from mucs_cli.runtime import keep_freed_memory

REPEATS = 3
SIZES = {"dit-tiny": (256, 5), "dit-384": (4, 4)}
"""Images and draws, so that all ends within minutes on two cores."""


def passes(model: str, num_images: int, num_draws: int, num_queries: int) -> dict[str, Callable[[], object]]:
    """Ways to score all queries on one block of images; "unshared" first."""
    network, shape = build(model)
    denoiser = EDMDenoiser(network.eval().requires_grad_(False))
    image = torch.rand(num_images, *shape) * 2 - 1
    label = torch.randint(0, 10, (num_images,)) if network.is_conditional else None
    score = partial(bank_losses, denoiser, image, label, draw_noise_bank(num_draws, shape))
    tensors = dict(network.named_parameters())
    depth = len(network.transformer_blocks)

    def unlearned(num_blocks: int) -> list[Mapping[str, Tensor]]:
        names = trainable_names(tensors, "last_blocks", num_blocks=num_blocks)
        return [{name: tensors[name] + 1e-3 * torch.randn_like(tensors[name]) for name in names}] * num_queries

    everywhere = unlearned(depth)
    ways: dict[str, Callable[[], object]] = {"unshared": lambda: [score([tensors]) for tensors in everywhere]}
    for num_blocks in sorted({1, 2, depth // 2, depth}):
        ways[f"last_{num_blocks}_of_{depth}"] = partial(score, unlearned(num_blocks))
    return ways


def num_operations(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def measure(ways: Mapping[str, Callable[[], object]], num_queries: int) -> dict[str, float]:
    """Seconds a query and, against the unshared passes, time and forward work of each way."""
    operations = {name: num_operations(work) for name, work in ways.items()}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(REPEATS):
        for name, work in ways.items():
            start = time.perf_counter()
            work()
            taken[name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(values) for name, values in taken.items()}
    result = {}
    for name in ways:
        result[f"{name}/seconds_a_query"] = round(seconds[name] / num_queries, 4)
        if name != "unshared":
            result[f"{name}/ratio"] = round(seconds[name] / seconds["unshared"], 3)
            result[f"{name}/work_ratio"] = round(operations[name] / operations["unshared"], 3)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--queries", type=int, default=3, help="queries a pass")
    parser.add_argument("--images", type=int, help="default: by the model")
    parser.add_argument("--draws", type=int, help="default: by the model")
    arguments = parser.parse_args()
    keep_freed_memory()
    result: dict[str, Any] = {
        "benchmark": "prefix",
        "queries": arguments.queries,
        "threads": torch.get_num_threads(),
    }
    for model in arguments.model:
        num_images, num_draws = arguments.images or SIZES[model][0], arguments.draws or SIZES[model][1]
        result |= {f"{model}/images": num_images, f"{model}/draws": num_draws}
        figures = measure(passes(model, num_images, num_draws, arguments.queries), arguments.queries)
        result |= {f"{model}/{key}": value for key, value in figures.items()}
    print_result(result)


if __name__ == "__main__":
    main()
