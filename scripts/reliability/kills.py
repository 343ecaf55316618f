"""Kills the whole chain at random moments, types the same command again until it is done, and compares what it left.

On a slice of the digits: training, sampling, unlearning one query at a time and stacked, scores by losses, by a race
and by gradient features, evaluation by retraining, and the report. Three kills of four are SIGKILL, the others SIGTERM
and SIGINT, after which the command has to end by itself and say how to go on. Every tensor, score, table and picture is
then held against a run that was never interrupted. Prints one JSON object on stdout, a table on stderr; ends with 1
where a file differs.

    python scripts/reliability/kills.py [--kills 25] [--seed 0] [--only attribution]
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
from printing import print_result

UNLEARNING = [
    "unlearning.max_steps=30",
    "unlearning.retain_batch_size=32",
    "unlearning.forget_batch_size=32",
]
SCORING = ["noise_bank.num_draws=10", "score.batch_size=16"]
COMMANDS = {
    "attribution": [
        "experiment=digits",
        "stages=[train,sample,unlearn,score]",
        "device=cpu",
        "data.limit=96",
        "data.holdout=16",
        "training.num_steps=120",
        "training.batch_size=32",
        "training.warmup_steps=5",
        "training.validate_every=20",
        "queries.num=3",
        "sampler.num_steps=4",
        "unlearning.tolerance=1.0",
        *UNLEARNING,
        *SCORING,
    ],
    "variant": [
        "stages=[unlearn,score]",
        *UNLEARNING,
        *SCORING,
        "unlearning.stack_size=3",
        "unlearning.forget_weight=0.5",
        "unlearning.null_loss=2",
        "unlearning.tolerance=0.4",  # so that the queries of the stack stop one after the other
        "score.mode=adaptive",
        "score.top_k=5",
    ],
    "evaluation": [
        "stages=[score,evaluate,report]",
        "method=dtrak",
        "method.num_draws=4",
        "method.num_projections=256",
        "evaluation=lds",
        "evaluation.num_subsets=4",
        "evaluation.num_draws=16",
        "evaluation.num_resamples=100",
        "report.k=5",
    ],
}
"""Each is a ``mucs run`` on the same folder, in this order."""
COMPARED = (".safetensors", ".csv", ".md", ".tex", ".png", ".svg")
COMPARED_BY_NAME = ("log.jsonl", "results.json")
"""What else has no times in it."""
PER_STAGE = 2
"""Kills of a stage in one round, at most: so that a round comes to the last stages."""


@dataclass
class Kills:
    """What was done to the runs.

    Attributes:
        per_stage: stage that was unfinished -> kills.
        per_signal: name -> kills.
        attempts: commands that were started.
    """

    per_stage: Counter[str] = field(default_factory=Counter)
    per_signal: Counter[str] = field(default_factory=Counter)
    attempts: int = 0


@dataclass(frozen=True)
class Reference:
    """A run that was never interrupted.

    Attributes:
        run: its folder.
        start: seconds that a command takes before its first stage.
        seconds: command -> how long it took.
        stages: command -> the manifests that it wrote, in order, relative to the run, with the seconds of each stage.
    """

    run: Path
    start: float
    seconds: dict[str, float]
    stages: dict[str, dict[Path, float]]


def start(name: str, run: Path, log: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "mucs_cli", "run", f"run={run}", *COMMANDS[name], "checkpoint.every_seconds=0.3"]
    with log.open("wb") as file:
        return subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=file,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            # A shell starts what it puts into the background with the interrupt ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


def finish(name: str, run: Path, log: Path) -> float:
    """Seconds of a command that is left alone."""
    began = time.monotonic()
    if start(name, run, log).wait() != 0:
        raise SystemExit(f"failed: mucs run {' '.join(COMMANDS[name])}\n{log.read_text()}")
    return time.monotonic() - began


def manifests(run: Path) -> set[Path]:
    """Of stages that a user asks for."""
    found = (path.relative_to(run) for path in run.rglob("manifest.json"))
    return {path for path in found if path.parts[0] not in ("data", "retrain") and not path.parts[1].startswith("_")}


def make_reference(folder: Path, names: list[str]) -> Reference:
    run, log = folder / "reference", folder / "log"
    seconds, stages, seen = {}, {}, set[Path]()
    before = 0.0
    for name in names:
        seconds[name] = finish(name, run, log)
        before = seconds[name] - float(re.findall(r"run: (\d+) seconds", log.read_text())[-1])
        new = manifests(run) - seen
        stages[name] = {
            path: json.loads((run / path).read_text())["seconds"]
            for path in sorted(new, key=lambda path: (run / path).stat().st_mtime_ns)
        }
        seen |= new
    return Reference(run, before, seconds, stages)


def kill_until_done(
    name: str, run: Path, log: Path, reference: Reference, source: random.Random, kills: Kills, enough: int
) -> None:
    """Types one command again and again.

    Args:
        enough: kills of all rounds, after which it is left alone.
    """
    here: Counter[Path] = Counter()
    while kills.per_signal.total() < enough:
        targets = [path for path in unfinished_of(name, run, reference) if here[path] < PER_STAGE]
        if not targets:
            break
        early = source.random() < 0.15
        share, number = source.random(), source.choice([signal.SIGKILL] * 6 + [signal.SIGTERM, signal.SIGINT])
        kills.attempts += 1
        began = time.time()
        child = start(name, run, log)
        while not early and child.poll() is None and not has_begun(run, targets[0].parent, began):
            time.sleep(0.01)
        try:
            code = child.wait(timeout=share * (reference.start if early else reference.stages[name][targets[0]]))
        except subprocess.TimeoutExpired:
            hit = next(iter(unfinished_of(name, run, reference)), None)
            child.send_signal(number)
            code = child.wait()
            here[hit or targets[0]] += 1
            if code:  # 0: it had just ended by itself
                kills.per_signal[number.name] += 1
                kills.per_stage[f"{name}: {'start' if early else place_of(run, hit)}"] += 1
            check_end(number, code, log)
        else:
            if code:
                raise SystemExit(f"kills.py: {name} ended with {code} by itself:\n{log.read_text()[-2000:]}")
        if code == 0:
            return
    kills.attempts += 1
    finish(name, run, log)


def unfinished_of(name: str, run: Path, reference: Reference) -> list[Path]:
    """The manifests that a command has still to write."""
    return [path for path in reference.stages[name] if not (run / path).exists()]


def place_of(run: Path, hit: Path | None) -> str:
    """Where a kill hit: the first stage that was unfinished, or a model that was trained again for it."""
    if hit is None:
        return "end"
    return "retrain" if hit.parts[0] == "evaluate" and any(run.glob("retrain/*/state.json")) else hit.parts[0]


def has_begun(run: Path, folder: Path, since: float) -> bool:
    """Whether a stage has been at its folder, an evaluation at a model's, since a time of the clock."""
    models = run.glob("retrain/*/state.json") if folder.parts[0] == "evaluate" else ()
    for path in (run / folder / "state.json", *models):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime >= since:
                return True
    return False


def check_end(number: signal.Signals, code: int, log: Path) -> None:
    """Raises SystemExit where a command that was asked to end did not do so as it should."""
    said = log.read_text()
    # Until Python has got as far as our first line, a signal ends it as any other program.
    expected = {0, -number, *([] if number == signal.SIGKILL else [128 + number])}
    if code not in expected or (code == 128 + number and "To go on, run it again" not in said):
        raise SystemExit(f"{number.name}: exit code {code}\n{said}")


def files(run: Path) -> Iterator[Path]:
    """What has to be equal, relative to the run."""
    for path in run.rglob("*"):
        name = path.relative_to(run)
        if "checkpoint" in name.parts or path.name.startswith(".") or not path.is_file():
            continue
        if path.suffix in COMPARED or path.name in COMPARED_BY_NAME:
            yield name


def hashes(run: Path) -> dict[str, str]:
    return {str(name): hashlib.sha256((run / name).read_bytes()).hexdigest() for name in files(run)}


def unfinished(run: Path) -> list[str]:
    """What only an unfinished stage should hold."""
    patterns = ("*.partial", "*.journal", "*.previous", "state.json", "unlearn/*/checkpoint", "done", "races")
    return sorted(str(path.relative_to(run)) for pattern in patterns for path in run.rglob(pattern))


def run_kills(num_kills: int, seed: int, names: list[str]) -> dict[str, Any]:
    """Rounds, each of a new run, until there were enough kills."""
    began, source, kills = time.monotonic(), random.Random(seed), Kills()
    equal, differing, rounds = 0, [], 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        reference = make_reference(folder, names)
        expected = hashes(reference.run)
        while kills.per_signal.total() < num_kills:
            run = folder / f"round-{rounds}"
            for name in names:
                kill_until_done(name, run, folder / "log", reference, source, kills, num_kills)
            found = hashes(run)
            same = {name for name in expected if found.get(name) == expected[name]}
            equal += len(same)
            differing += [f"round {rounds}: {name}" for name in sorted({*expected, *found} - same)]
            differing += [f"round {rounds}: {name} is left over" for name in unfinished(run)]
            rounds += 1
    return {
        "check": "kills",
        "seed": seed,
        "rounds": rounds,
        "attempts": kills.attempts,
        "reference_seconds": {name: round(seconds, 1) for name, seconds in reference.seconds.items()},
        "start_seconds": round(reference.start, 1),
        "kills": kills.per_signal.total(),
        "kills_per_signal": dict(kills.per_signal),
        "kills_per_stage": dict(kills.per_stage),
        "files": len(expected),
        "equal_files": equal,
        "differing_files": differing,
        "seconds": round(time.monotonic() - began),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25, help="at least so many")
    parser.add_argument(
        "--seed", type=int, default=None, help="of the moments and signals; drawn, and printed, if left out"
    )
    parser.add_argument("--only", choices=tuple(COMMANDS), default=None, help="end after this command of the chain")
    arguments = parser.parse_args()
    seed = random.SystemRandom().randrange(2**31) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", file=sys.stderr)
    names = list(COMMANDS)
    result = run_kills(arguments.kills, seed, names[: names.index(arguments.only or names[-1]) + 1])
    print_result(result)
    return 1 if result["differing_files"] else 0


if __name__ == "__main__":
    sys.exit(main())
