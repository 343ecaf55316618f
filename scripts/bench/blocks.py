"""Retrieval of planted causes when only the last blocks of a network unlearn, against its preset, with times.

Ten handwritten digits stand on their heads, which no other image does; each is a query, and eight noisy copies of each,
half of them moved by a pixel, are planted among the 1,797 digits. A DiT of six blocks learns them all without being
told classes. Then every query is unlearned in the last 1, 2, half or all blocks, or as unlearning.trainable=auto does,
and all images are scored. Prints one JSON object on stdout, a table on stderr. The trained model is kept below
--folder.

    python scripts/bench/blocks.py [--draws 20] [--steps 3000] [--folder outputs/bench]
"""

import argparse
import csv
from pathlib import Path

import numpy as np
from bench_runs import mucs, score, take_away
from PIL import Image
from printing import print_result
from sklearn.datasets import load_digits

NUM_QUERIES, NUM_COPIES, DEPTH = 10, 8, 6
NOISE = 1.5
"""Standard deviation of the noise on a copy, in the digits' 17 shades."""
CHOICES = {
    "auto": [],
    **{
        f"last_{count}": ["unlearning.trainable=last_blocks", f"unlearning.num_blocks={count}"]
        for count in (1, 2, DEPTH // 2, DEPTH)
    },
}


def write_pictures(folder: Path) -> None:
    """``data/`` and ``queries/``, each with a metadata.csv whose column ``source`` a query and its copies share."""
    digits, source = load_digits().images, np.random.default_rng(0)
    rows: dict[str, list[tuple[str, str]]] = {"data": [], "queries": []}

    def save(kind: str, name: str, shades: np.ndarray, group: str) -> None:
        (folder / kind).mkdir(parents=True, exist_ok=True)
        pixels = (shades.clip(0, 16) / 16 * 255).round().astype(np.uint8)
        Image.fromarray(pixels).save(folder / kind / name)
        rows[kind].append((name, group))

    for index, shades in enumerate(digits):
        save("data", f"digit_{index:04d}.png", shades, "")
    for query in range(NUM_QUERIES):
        upset = digits[100 + query][::-1]
        save("queries", f"query_{query}.png", upset, f"query {query}")
        for copy in range(NUM_COPIES):
            moved = np.roll(upset, copy % 2, axis=1)
            noisy = moved + source.normal(0, NOISE, moved.shape)
            save("data", f"copy_{query}_{copy}.png", noisy, f"query {query}")
    for kind, listed in rows.items():
        with (folder / kind / "metadata.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("file_name", "source"), *listed])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--steps", type=int, default=3000, help="training updates")
    parser.add_argument("--folder", type=Path, default=Path("outputs/bench"))
    arguments = parser.parse_args()
    folder = arguments.folder / "planted"
    run = folder / "run"
    if not (folder / "queries").exists():
        write_pictures(folder)
    data = ["data=image_folder", f"data.path={folder / 'data'}", "queries=folder", f"queries.path={folder / 'queries'}"]
    model = ["model=dit", "model.size=tiny", f"model.num_layers={DEPTH}", "model.dropout=0", "model.conditional=false"]
    model += ["diffusion=edm_auto"]
    training = [f"training.num_steps={arguments.steps}", "training.batch_size=128", "training.learning_rate=4e-3"]
    training += ["training.warmup_steps=200", "training.decay=cosine", "training.ema_decay=0.999"]
    mucs("run", *data, *model, *training, f"run={run}", "device=cpu", "stages=[train,sample]")
    take_away(run, "unlearn", "score", "evaluate")
    result = {"benchmark": "blocks", "queries": NUM_QUERIES, "planted": NUM_COPIES, "draws": arguments.draws}
    draws = f"noise_bank.num_draws={arguments.draws}"
    names = {}
    for choice, keys in CHOICES.items():
        take_away(run, "score/_base")  # each choice pays for the base model's losses
        result[f"{choice}_unlearn_seconds"] = round(mucs("unlearn", f"run={run}", *keys).seconds, 1)
        names[choice], cost = score(run, draws, *keys)
        result[f"{choice}_score_seconds"] = round(cost.seconds, 1)
    names["pixel"], _ = score(run, "method=pixel")
    retrieval = ["evaluation=retrieval", "evaluation.relevant=column", "evaluation.column=source"]
    mucs("evaluate", f"run={run}", *retrieval, f"evaluation.k={NUM_COPIES}")
    with (run / "evaluate" / "retrieval" / "table.csv").open(newline="") as file:
        rows = {row["variant"]: row for row in csv.DictReader(file)}
    for choice, name in names.items():
        for key, value in rows[name].items():
            if key.startswith(("precision", "average_precision")):
                result[f"{choice}_{key}"] = round(float(value), 3) if value else None
    print_result(result)


if __name__ == "__main__":
    main()
