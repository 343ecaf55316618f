"""Throughput of the score engine against a bare loop that only calls the same network on ready-made batches.

The bare loop gets the best of several batch sizes and the same threads. Both are timed in turn, five times; the ratio
is of the medians. Prints one JSON object on stdout, a table on stderr.

    python scripts/bench/score_throughput.py [--model dit-tiny|dit-384|unet-tiny] [--images 1797] [--keep-malloc]
"""

import argparse
import statistics
import time

import torch
from printing import print_result

from mucs_cli.attribution.scoring import bank_losses, blocks_of, choose_block_size
from mucs_cli.attribution.skew import mean_skew
from mucs_cli.diffusion.denoiser import EDMDenoiser
from mucs_cli.diffusion.networks import DiT
from mucs_cli.diffusion.noise_bank import draw_noise_bank
from mucs_cli.diffusion.unet import UNet
from mucs_cli.runtime import keep_freed_memory

REPEATS = 5
BATCH_SIZES = (4, 8, 16, 32, 64, 128, 256, 512, 1024)


def build(name: str) -> tuple[DiT | UNet, tuple[int, int, int]]:
    """The network and its image shape."""
    torch.manual_seed(0)
    if name == "dit-tiny":
        return DiT(8, 1, 2, 64, 3, 4, num_classes=10), (1, 8, 8)
    if name == "dit-384":
        return DiT(32, 3, 2, 384, 12, 6), (3, 32, 32)
    return UNet(8, 1, 16, (1, 2), 1, (4,), norm_groups=16), (1, 8, 8)


@torch.inference_mode()
def bare_seconds(network: DiT | UNet, shape: tuple[int, int, int], size: int, labelled: bool, total: int) -> float:
    """Seconds an image of a loop that only calls the network on one ready-made batch."""
    sample, c_noise = torch.randn(size, *shape), torch.zeros(size)
    label = torch.zeros(size, dtype=torch.int64) if labelled else None
    network(sample, c_noise, label)
    calls = max(1, total // size)
    start = time.perf_counter()
    for _ in range(calls):
        network(sample, c_noise, label)
    return (time.perf_counter() - start) / (calls * size)


def engine_seconds(
    denoiser: EDMDenoiser, raw: torch.Tensor, label: torch.Tensor | None, size: int, num_draws: int
) -> float:
    """Seconds an evaluation of the engine: loading, noising, network, loss and skew; padding counts as its cost."""
    bank = draw_noise_bank(num_draws, tuple(raw.shape[1:]))  # type: ignore[arg-type]
    start = time.perf_counter()
    for block in blocks_of(len(raw), size):
        rows = block.rows()
        image = raw[rows].float() / 127.5 - 1
        condition = None if label is None else label[rows]
        # apart, as a run computes the base model's and a query's; together, equal models would share all
        base, other = (bank_losses(denoiser, image, condition, bank)[0, : len(block)] for _ in range(2))
        mean_skew(base, other)
    return (time.perf_counter() - start) / (2 * num_draws * len(raw))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dit-tiny", choices=("dit-tiny", "dit-384", "unet-tiny"))
    parser.add_argument("--images", type=int, default=1797, help="training images")
    parser.add_argument("--draws", type=int, default=3, help="draws a repeat")
    parser.add_argument("--keep-malloc", action="store_true", help="leave the memory allocator as it is")
    arguments = parser.parse_args()
    if not arguments.keep_malloc:
        keep_freed_memory()
    network, shape = build(arguments.model)
    network.eval().requires_grad_(False)
    denoiser = EDMDenoiser(network)
    labelled = network.is_conditional
    raw = torch.randint(0, 256, (arguments.images, *shape), dtype=torch.uint8)
    label = torch.randint(0, 10, (arguments.images,)) if labelled else None
    total = arguments.images * arguments.draws
    probe = {
        size: bare_seconds(network, shape, size, labelled, min(total, 4 * size))
        for size in BATCH_SIZES
        if size <= total
    }
    best = min(probe, key=lambda size: probe[size])
    bank = draw_noise_bank(1, shape)
    first = raw[:256].float() / 127.5 - 1
    size = choose_block_size(denoiser, first, None if label is None else label[:256], bank, arguments.images)
    bare, engine = [], []
    for _ in range(REPEATS):
        bare.append(bare_seconds(network, shape, best, labelled, total))
        engine.append(engine_seconds(denoiser, raw, label, size, arguments.draws))
    result = {
        "benchmark": "score_throughput",
        "model": arguments.model,
        "images": arguments.images,
        "threads": torch.get_num_threads(),
        "malloc_tuned": not arguments.keep_malloc,
        "bare_batch_size": best,
        "bare_images_per_second": round(1 / statistics.median(bare), 1),
        "engine_block_size": size,
        "engine_images_per_second": round(1 / statistics.median(engine), 1),
        "ratio": round(statistics.median(bare) / statistics.median(engine), 3),
    }
    print_result(result)


if __name__ == "__main__":
    main()
