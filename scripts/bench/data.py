"""Time to make a folder of pictures ready, for a run's first stage and for a later one.

Writes pictures cut from scikit-learn's two photographs (half JPEG, half PNG, nested folders, a metadata.csv) into a
temporary folder, then loads them as a stage does: once with nothing there (listing, decoding, hashing, caching), and
then again, each time in a fresh process. Seconds count from the end of the imports to the data set being ready; the
first batch of 256 images is read on top. Prints one JSON object on stdout, a table on stderr.

    python scripts/bench/data.py [--images 4000] [--size 64] [--repeats 3]
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from printing import print_result
from sklearn.datasets import load_sample_images

LOAD = """
import sys, time
from pathlib import Path
started = time.perf_counter()
from mucs_cli.schemas import ImageFolderConfig
from mucs_cli.data.dataset import load_dataset
import mucs_cli.data.image_folder
imported = time.perf_counter()
config = ImageFolderConfig(seed=0, path=sys.argv[1], labels="folder")
dataset = load_dataset(config, Path(sys.argv[2]))
ready = time.perf_counter()
dataset.images(range(min(256, len(dataset))))
batch = time.perf_counter()
print(imported - started, ready - imported, batch - ready, dataset.fingerprint)
"""


def write_pictures(folder: Path, count: int, size: int) -> None:
    """``count`` distinct crops in ten class folders, and a metadata file with a row a picture."""
    photographs = load_sample_images().images
    rows = ["file_name,licence,source\n"]
    for index in range(count):
        photograph = photographs[index % 2]
        row = index * 7 % (photograph.shape[0] - size)
        column = index * 13 % (photograph.shape[1] - size)
        name = f"class{index % 10}/{index:06d}.{('jpg', 'png')[index // 2 % 2]}"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photograph[row : row + size, column : column + size]).save(folder / name)
        rows.append(f"{name},CC BY,scikit-learn\n")
    (folder / "metadata.csv").write_text("".join(rows))


def timed_load(folder: Path, run: Path) -> tuple[list[float], str]:
    """Seconds for imports, until ready, and for the first batch; and the fingerprint."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder), str(run)], stdout=subprocess.PIPE, text=True, check=True
    )
    *seconds, fingerprint = done.stdout.split()
    return [float(value) for value in seconds], fingerprint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4000, help="pictures in the folder")
    parser.add_argument("--size", type=int, default=64, help="their side, pixels")
    parser.add_argument("--repeats", type=int, default=3, help="later loads; the median counts")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, run = Path(temporary) / "pictures", Path(temporary) / "run"
        write_pictures(folder, arguments.images, arguments.size)
        first, fingerprint = timed_load(folder, run)
        later = [timed_load(folder, run) for _ in range(arguments.repeats)]
        assert all(found == fingerprint for _, found in later)
        ready = statistics.median(seconds[1] for seconds, _ in later)
        result = {
            "benchmark": "data",
            "images": arguments.images,
            "size": arguments.size,
            "cache_mib": round((run / "data" / "images.safetensors").stat().st_size / 2**20, 1),
            "imports_seconds": round(statistics.median(seconds[0] for seconds, _ in later), 2),
            "first_seconds": round(first[1], 2),
            "first_images_per_second": round(arguments.images / first[1]),
            "later_seconds": round(ready, 3),
            "later_batch_of_256_seconds": round(statistics.median(seconds[2] for seconds, _ in later), 4),
        }
    print_result(result)


if __name__ == "__main__":
    main()
