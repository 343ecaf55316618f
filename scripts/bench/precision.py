"""What numeric precision, layout and compilation do to scoring: speed of a forward pass, and the ranking.

First a network's forward pass in float32, in bfloat16, with channels last in memory and as torch.compile makes it,
timed in turn, five times (medians, the seconds of compiling apart; on a CPU processor time, which counts no other
work). Then the digits' queries scored in float32 and in another precision: rank correlation and recall of the highest
k. Without a CUDA device, tf32 is the ranking alone, of operands rounded as such a device rounds them. Prints one JSON
object on stdout, a table on stderr.

    python scripts/bench/precision.py [--model dit-tiny|dit-384|unet-tiny] [--precision bfloat16|tf32]
        [--queries 10] [--draws 100] [--k 36] [--folder FOLDER] [--no-ranking]
"""

import argparse
import copy
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_runs import agreement, make_run, mucs, score, scores_of, take_away
from printing import print_result
from score_throughput import build
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mucs_cli.cli import main as main_of_mucs
from mucs_cli.runtime import keep_freed_memory, matmul_precision, pick_device

REPEATS = 5
SECONDS = 2.0
"""Of each timing, about."""


def is_emulated(precision: str) -> bool:
    return precision == "tf32" and pick_device("auto").type != "cuda"


def timed(call: Callable[[], Tensor], count: int, clock: Callable[[], float]) -> float:
    started = clock()
    for _ in range(count):
        result = call()
    result.sum().item()  # waits for the device
    return (clock() - started) / count


def speeds(name: str, precision: str, size: int) -> dict[str, Any]:
    """Of one forward pass of ``size`` images."""
    device = pick_device("auto")
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    network, shape = build(name)
    network.eval().requires_grad_(False).to(device)
    sample, c_noise = torch.randn(size, *shape, device=device), torch.zeros(size, device=device)
    label = torch.zeros(size, dtype=torch.int64, device=device) if network.is_conditional else None
    compiled = torch.compile(network)
    turned = copy.deepcopy(network).to(memory_format=torch.channels_last)
    turned_sample = sample.to(memory_format=torch.channels_last)

    def plain() -> Tensor:
        with torch.inference_mode():
            return network(sample, c_noise, label)

    def rounded() -> Tensor:
        with matmul_precision(device, precision):
            return plain()

    def channels_last() -> Tensor:
        with torch.inference_mode():
            return turned(turned_sample, c_noise, label)

    def fused() -> Tensor:
        with torch.no_grad():
            return compiled(sample, c_noise, label)

    calls = {"float32": plain, precision: rounded, "channels_last": channels_last, "compiled": fused}
    started = time.perf_counter()
    try:
        fused()
    except torch._dynamo.exc.BackendCompilerFailed as error:  # no compiler, for example
        print(f"torch.compile does not work here: {str(error).splitlines()[0]}", file=sys.stderr)
        del calls["compiled"]
    compiling = time.perf_counter() - started
    count = max(1, round(SECONDS / timed(plain, 2, clock)))
    found: dict[str, list[float]] = {key: [] for key in calls}
    for _ in range(REPEATS):
        for key, call in calls.items():
            found[key].append(timed(call, count, clock))
    median = {key: statistics.median(values) for key, values in found.items()}
    return {
        "model": name,
        "batch_size": size,
        "device": str(device),
        "float32_ms": round(1e3 * median["float32"], 2),
        **{f"{key}_speed": round(median["float32"] / median[key], 2) for key in calls if key != "float32"},
        **({"compiling_seconds": round(compiling, 1)} if "compiled" in calls else {}),
    }


def to_tf32(tensor: Tensor) -> Tensor:
    """A float32 tensor with the 10 bits of mantissa that TF32 keeps of 23 (NVIDIA's A100 white paper), to nearest."""
    if tensor.dtype != torch.float32:
        return tensor
    return ((tensor.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class TF32Products(TorchFunctionMode):
    """Rounds the operands of matrix products and convolutions; what is added up stays float32, as on the device.

    Attributes:
        count: of products so far.
    """

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, key, value = args
            assert not kwargs.keys() - {"dropout_p"}
            self.count += 2
            weight = to_tf32(query) @ to_tf32(key).mT / query.shape[-1] ** 0.5
            return to_tf32(weight.softmax(-1)) @ to_tf32(value)
        if func in (torch.nn.functional.linear, torch.nn.functional.conv2d):
            self.count += 1
            return func(to_tf32(args[0]), to_tf32(args[1]), *args[2:], **kwargs)
        if func in (torch.matmul, torch.bmm, torch.baddbmm, torch.addmm, Tensor.matmul, Tensor.__matmul__):
            raise TypeError(f"{func} is not rounded: add it")
        return func(*args, **kwargs)


def score_as_tf32(run: Path, draws: int) -> Path:
    """A copy of the run, scored with rounded operands in this process."""
    other = run.with_name(f"{run.name}-tf32")
    shutil.rmtree(other, ignore_errors=True)
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("score", "evaluate", "report"))
    with TF32Products() as products:
        if main_of_mucs(["score", f"run={other}", f"noise_bank.num_draws={draws}", "device=cpu"]) or not products.count:
            raise SystemExit("scoring has failed, or has no product that was rounded")
    return other


def ranking(folder: Path, precision: str, queries: int, draws: int, k: int) -> dict[str, Any]:
    """Of the digits, in ``precision`` against float32; the run is kept."""
    run = folder / f"digits-{queries}"
    make_run("digits", run, queries)
    mucs("unlearn", f"run={run}")
    take_away(run, "score")
    name = score(run, f"noise_bank.num_draws={draws}")[0]
    exact = scores_of(run, name)[0]["score"]
    if is_emulated(precision):
        other = scores_of(score_as_tf32(run, draws), name)[0]["score"]
    else:
        rounded = score(run, f"noise_bank.num_draws={draws}", f"score.precision={precision}")[0]
        other = scores_of(run, rounded)[0]["score"]
    recall, correlation = agreement(exact, other, k)
    return {
        "queries": queries,
        "draws": draws,
        "k": k,
        "spearman": round(float(np.mean(correlation)), 5),
        "lowest_spearman": round(min(correlation), 5),
        "recall_at_k": round(float(np.mean(recall)), 4),
        "lowest_recall_at_k": round(min(recall), 4),
        "largest_difference_of_a_score": float(np.abs(exact - other).max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dit-tiny", choices=("dit-tiny", "dit-384", "unet-tiny"))
    parser.add_argument("--precision", default="bfloat16", choices=("bfloat16", "tf32"))
    parser.add_argument("--batch-size", type=int, help="images a forward pass (default: 384, of dit-384 8)")
    parser.add_argument("--queries", type=int, default=10)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--k", type=int, default=36)
    parser.add_argument("--folder", type=Path, default=Path("outputs/bench"))
    parser.add_argument("--no-ranking", action="store_true", help="speeds only")
    arguments = parser.parse_args()
    emulated = is_emulated(arguments.precision)
    if emulated and arguments.no_ranking:
        parser.error("argument --no-ranking: the speed of tf32 is that of a CUDA device; there is none here")
    keep_freed_memory()
    size = arguments.batch_size or (8 if arguments.model == "dit-384" else 384)
    result: dict[str, Any] = {"benchmark": "precision", "precision": arguments.precision, "emulated": emulated}
    if not emulated:
        result |= speeds(arguments.model, arguments.precision, size)
    if not arguments.no_ranking:
        result |= ranking(arguments.folder, arguments.precision, arguments.queries, arguments.draws, arguments.k)
    print_result(result)


if __name__ == "__main__":
    main()
