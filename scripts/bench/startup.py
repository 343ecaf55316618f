"""How long a command takes to start: help, composition of a configuration, and the imports of a stage.

Each is a process of its own, five times. Prints one JSON object on stdout (medians, seconds), a table on stderr.

    python scripts/bench/startup.py
"""

import statistics
import subprocess
import sys
import time

from printing import print_result

REPEATS = 5
PROGRAM = [sys.executable, "-m", "mucs_cli"]
COMMANDS = {
    "python": [sys.executable, "-c", "pass"],
    "mucs --help": [*PROGRAM, "--help"],
    "mucs train --help": [*PROGRAM, "train", "--help"],
    "mucs train --cfg job": [*PROGRAM, "train", "experiment=digits", "--cfg", "job"],
    "imports of the score stage": [sys.executable, "-c", "import mucs_cli.stages.score"],
}


def seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    times = {name: statistics.median(seconds(command) for _ in range(REPEATS)) for name, command in COMMANDS.items()}
    seconds_of = {name: round(value, 3) for name, value in times.items()}
    ratio = round(times["mucs --help"] / times["python"], 2)
    print_result({"benchmark": "startup", **seconds_of, "help_over_python": ratio})


if __name__ == "__main__":
    main()
