"""How long a command takes to start: help, composition of a configuration, the imports of a stage, and a later stage.

The later stages are those of a tiny run that has been made: one that is up to date, and one that has hardly anything to
do. Each is a process of its own, five times. Prints one JSON object on stdout (medians, seconds), a table on stderr.

    python scripts/bench/startup.py
"""

import statistics
import subprocess
import sys
import tempfile
import time

from printing import print_result

REPEATS = 5
TINY = [
    *("experiment=digits", "device=cpu", "data.limit=64", "queries.num=1", "training.num_steps=1", "model.width=16"),
    *("sampler.num_steps=2", "stages=[train,sample,unlearn,score]"),
]
SHORT = ["unlearning.num_steps=1", "noise_bank.num_draws=4"]
PROGRAM = [sys.executable, "-m", "mucs_cli"]
COMMANDS = {
    "python": [sys.executable, "-c", "pass"],
    "mucs --help": [*PROGRAM, "--help"],
    "mucs train --help": [*PROGRAM, "train", "--help"],
    "mucs train --cfg job": [*PROGRAM, "train", "experiment=digits", "--cfg", "job"],
    "imports of the score stage": [sys.executable, "-c", "import mucs_cli.stages.score"],
}


def repeated(command: list[str]) -> list[float]:
    return [seconds([part.format(repeat=repeat) for part in command]) for repeat in range(REPEATS)]


def seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        run = f"run={temporary}/run"
        subprocess.run([*PROGRAM, "run", *TINY, *SHORT, run], check=True, capture_output=True)
        commands = COMMANDS | {
            "mucs status": [*PROGRAM, "status", run],
            "mucs score, up to date": [*PROGRAM, "score", *SHORT, run],
            "mucs score method=random": [*PROGRAM, "score", run, "method=random", "method.seed={repeat}"],
        }
        times = {name: statistics.median(repeated(command)) for name, command in commands.items()}
    seconds_of = {name: round(value, 3) for name, value in times.items()}
    ratio = round(times["mucs --help"] / times["python"], 2)
    print_result({"benchmark": "startup", **seconds_of, "help_over_python": ratio})


if __name__ == "__main__":
    main()
