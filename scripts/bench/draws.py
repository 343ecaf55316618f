"""Which noise banks rank alike for fewer draws: how much a score moves with the bank's seed, at equal cost.

For a few unlearned models of a run, banks of --draws draws that differ in their noise alone: the levels of each grid,
with noise of its own for every draw, and with pairs of neighbouring levels that share theirs with opposite signs
(antithetic). Of each kind: the variance of a score over banks beside its variance over images, and what of it would be
left if every part of the grid had as many draws as its spread asks for (Neyman's allocation). Prints one JSON object on
stdout, a table on stderr.

    python scripts/bench/draws.py RUN [--variant mucs] [--queries 3] [--draws 10] [--banks 6] [--images 600]
"""

import argparse
from pathlib import Path

import torch
from printing import print_result
from safetensors.torch import load_file
from torch import Tensor

from mucs_cli.attribution.scoring import bank_losses
from mucs_cli.attribution.skew import skew
from mucs_cli.data.record import Record
from mucs_cli.diffusion.checkpoint import load_denoiser
from mucs_cli.diffusion.noise_bank import draw_noise_bank

GRIDS = ("truncated", "even", "full")


def noise_share(values: Tensor) -> tuple[float, float]:
    """Of skews [K, B, n] under K banks: variance of the score over banks by that over images, and Neyman's factor.

    What a bank does to all images alike does not count.
    """
    own = values - values.mean(dim=1, keepdim=True)
    score = own.mean(dim=2)
    share = score.var(dim=0).mean() / score.mean(dim=0).var()
    spread = own.var(dim=0).mean(dim=0).sqrt()  # of a draw's value, by place in the bank
    return float(share), float(spread.mean() ** 2 / spread.square().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--variant", default="mucs", help="folder below unlearn/")
    parser.add_argument("--queries", type=int, default=3)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--banks", type=int, default=6)
    parser.add_argument("--images", type=int, default=600)
    arguments = parser.parse_args()
    record = Record.read(arguments.run / "data")
    raw = load_file(arguments.run / "data" / "images.safetensors")["image"][: arguments.images]
    image = raw.float() / (float(record.manifest["levels"]) / 2) - 1
    denoiser = load_denoiser(arguments.run / "train" / "model")
    denoiser.network.eval().requires_grad_(False)
    condition = None
    if denoiser.network.is_conditional:
        if record.has_conditions or record.label is None:
            raise SystemExit(f"{arguments.run}: its model has vectors as conditions; expected class labels, or none.")
        condition = torch.from_numpy(record.label[: arguments.images])
    folder = arguments.run / "unlearn" / arguments.variant
    paths = sorted(folder.glob("query_*.safetensors"))[: arguments.queries]
    if not paths:
        raise SystemExit(f"{folder}: no unlearned models; expected those of a variant. Choose another --variant.")
    models = [{}, *(load_file(path) for path in paths)]
    result = {"benchmark": "draws", "images": len(image), "queries": len(paths), "draws": arguments.draws}
    for grid in GRIDS:
        for antithetic in (False, True):
            banks = [
                draw_noise_bank(
                    arguments.draws,
                    tuple(image.shape[1:]),  # type: ignore[arg-type]
                    grid=grid,
                    seed=seed,
                    antithetic=antithetic,
                    even_sigma=denoiser.even_sigma,
                )
                for seed in range(arguments.banks)
            ]
            name = f"{grid}_{'antithetic' if antithetic else 'independent'}"
            losses = [bank_losses(denoiser, image, condition, bank, models) for bank in banks]
            both = torch.stack(losses)  # [K, M, B, n]
            found = [noise_share(skew(both[:, 0], both[:, query])) for query in range(1, len(models))]
            result[f"{name}_noise_share"] = round(sum(share for share, _ in found) / len(found), 5)
            result[f"{name}_neyman_factor"] = round(sum(factor for _, factor in found) / len(found), 3)
    print_result(result)


if __name__ == "__main__":
    main()
