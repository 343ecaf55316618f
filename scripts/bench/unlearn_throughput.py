"""Throughput of the unlearning engine against a bare forward-backward-step loop, and of a stack against one at a time.

The bare loop repeats forward pass, mean squared error, backward pass and update on one ready-made batch, with the same
network, trainable parameters, batch sizes, optimiser and threads. The engine's steps load their training images, draw
levels and noise, clamp, weigh and log. Bare loop, engine and stack are timed in turn, five times; a figure is the
median over the five of the median step, for one query, and ratios are of these. The query's own loss, measured once
before and once after all steps, is counted in ``query_seconds`` alone. Prints one JSON object on stdout, a table on
stderr.

    python scripts/bench/unlearn_throughput.py [--model dit-tiny|dit-16|dit-384|unet-tiny] [--retain 100] [--forget 100]

On a machine that is busy with other things, OMP_NUM_THREADS=1 and --cpu-time count this process's time alone.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from itertools import pairwise

import torch
from printing import print_result
from torch import Tensor
from torch.nn import functional as F

from mucs_cli.attribution.trainable import trainable_names
from mucs_cli.attribution.unlearning import (
    OnStep,
    UnlearningSettings,
    UnlearningStep,
    batch_source,
    choose_stack_size,
    step_seconds,
    unlearn,
    unlearn_stacked,
)
from mucs_cli.attribution.unlearning_batch import BatchSource, RetainBatch
from mucs_cli.attribution.unlearning_models import select_parameters
from mucs_cli.diffusion.denoiser import EDMDenoiser
from mucs_cli.diffusion.networks import DiT
from mucs_cli.diffusion.unet import UNet
from mucs_cli.rng import ShuffledOrder
from mucs_cli.runtime import keep_freed_memory

REPEATS = 5
Clock = Callable[[], float]


def build(name: str) -> tuple[DiT | UNet, tuple[int, int, int], str]:
    """The network, its image shape, and which of its parameters are unlearned by default."""
    torch.manual_seed(0)
    if name == "dit-tiny":
        return DiT(8, 1, 2, 64, 3, 4, num_classes=10), (1, 8, 8), "mlp"
    if name == "dit-16":
        return DiT(8, 1, 4, 16, 2, 2, num_classes=10), (1, 8, 8), "mlp"
    if name == "dit-384":
        return DiT(32, 3, 2, 384, 12, 6), (3, 32, 32), "mlp"
    return UNet(8, 1, 16, (1, 2), 1, (4,), norm_groups=16), (1, 8, 8), "all_but_bias"


class Bench:
    """One network, its data, and the three loops; each gives the seconds of a step of one query."""

    def __init__(self, model: str, num_images: int, retain: int, settings: UnlearningSettings, clock: Clock):
        network, self.shape, preset = build(model)
        self.denoiser = EDMDenoiser(network.eval())
        self.trainable = trainable_names([name for name, _ in network.named_parameters()], preset)
        self.base = {name: p.detach().clone() for name, p in network.named_parameters()}
        self.retain, self.settings, self.clock = retain, settings, clock
        self.raw = torch.randint(0, 256, (num_images, *self.shape), dtype=torch.uint8)
        self.label = torch.randint(0, 10, (num_images,)) if network.is_conditional else None

    def restore(self) -> None:
        self.denoiser.network.load_state_dict(self.base, strict=False)

    def retain_batches(self, query: int) -> RetainBatch:
        order = ShuffledOrder(len(self.raw), 0, "retain_order", query)

        def batch(number: int) -> tuple[Tensor, Tensor | None]:
            rows = order.batch(number, self.retain)
            return self.raw[rows].float() / 127.5 - 1, None if self.label is None else self.label[rows]

        return batch

    def query(self, query: int) -> tuple[Tensor, Tensor | None]:
        return self.raw[query].float() / 127.5 - 1, None if self.label is None else self.label[query : query + 1]

    def source(self, query: int) -> BatchSource:
        return batch_source(
            self.denoiser, *self.query(query), self.retain_batches(query), self.settings, seed=0, query_id=query
        )

    def bare(self, steps: int) -> float:
        self.restore()
        network, size = self.denoiser.network, self.retain + self.settings.forget_batch_size
        optimizer = self.settings.new_optimizer(select_parameters(network, self.trainable).values())
        sample, target = torch.randn(2, size, *self.shape)
        c_noise = torch.zeros(size)
        label = None if self.label is None else self.label[torch.arange(size) % len(self.label)]

        def step() -> None:
            optimizer.zero_grad()
            F.mse_loss(network(sample, c_noise, label), target).backward()
            optimizer.step()

        starts = []
        for _ in range(steps):
            starts.append(self.clock())
            step()
        return step_time(starts)

    def one(self) -> tuple[float, float]:
        """Seconds a step, and of the whole query."""
        self.restore()
        started = self.clock()
        seconds = self.timed(
            lambda note: unlearn(
                self.denoiser, self.trainable, *self.query(0), self.retain_batches(0), self.settings, 0, 0, note
            )
        )
        return seconds, self.clock() - started

    def stacked(self, count: int) -> float:
        self.restore()
        sources = [self.source(query) for query in range(count)]
        seconds = self.timed(
            lambda note: list(unlearn_stacked(self.denoiser, self.trainable, sources, self.settings, note))
        )
        return seconds / count

    def timed(self, run: Callable[[OnStep], object]) -> float:
        """Median seconds of a step."""
        starts: dict[int, float] = {}

        def note(query: int, step: UnlearningStep) -> None:
            starts.setdefault(step.step, self.clock())

        run(note)
        return step_time(starts.values())


def step_time(starts: Iterable[float]) -> float:
    """Median seconds of a step; not of the first, which also measures the query's loss and allocates."""
    return statistics.median([later - earlier for earlier, later in pairwise(starts)][1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dit-tiny", choices=("dit-tiny", "dit-16", "dit-384", "unet-tiny"))
    parser.add_argument("--images", type=int, default=1797, help="training images")
    parser.add_argument("--retain", type=int, default=100, help="training images an update")
    parser.add_argument("--forget", type=int, default=100, help="noisy copies of the query an update")
    parser.add_argument("--steps", type=int, default=10, help="updates a repeat, at least 3")
    parser.add_argument("--stack", type=int, nargs="*", default=[4, 16], help="queries at once")
    parser.add_argument("--cpu-time", action="store_true", help="this process's time on the processor, all threads")
    arguments = parser.parse_args()
    keep_freed_memory()
    settings = UnlearningSettings(
        null_loss=None, learning_rate=1e-5, forget_batch_size=arguments.forget, num_steps=arguments.steps
    )
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    bench = Bench(arguments.model, arguments.images, arguments.retain, settings, clock)
    bare, one, query = [], [], []
    stacked: dict[int, list[float]] = {count: [] for count in arguments.stack}
    for _ in range(REPEATS):
        bare.append(bench.bare(arguments.steps))
        step, whole = bench.one()
        one.append(step)
        query.append(whole)
        for count, seconds in stacked.items():
            seconds.append(bench.stacked(count))
    alone = statistics.median(one)

    def measured(count: int) -> float:
        sources = [bench.source(query) for query in range(count)]
        return step_seconds(bench.denoiser, bench.trainable, sources, settings)

    bench.restore()
    result = {
        "benchmark": "unlearn_throughput",
        "model": arguments.model,
        "retain_batch_size": arguments.retain,
        "forget_batch_size": arguments.forget,
        "threads": torch.get_num_threads(),
        "clock": "cpu" if arguments.cpu_time else "wall",
        "steps": arguments.steps,
        "bare_step_seconds": round(statistics.median(bare), 5),
        "engine_step_seconds": round(alone, 5),
        "ratio": round(statistics.median(bare) / alone, 3),
        "query_seconds": round(statistics.median(query), 3),
        **{f"stack_{count}_step_seconds": round(statistics.median(seconds), 5) for count, seconds in stacked.items()},
        **{f"stack_{count}_gain": round(alone / statistics.median(seconds), 3) for count, seconds in stacked.items()},
        **({"chosen_stack_size": choose_stack_size(measured, max(stacked))} if stacked else {}),
    }
    print_result(result)


if __name__ == "__main__":
    main()
