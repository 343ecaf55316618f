"""Breaks copies of finished runs, and wants of the next command one line and exit code 2, or the sound result.

Each trial copies a tiny run, breaks one thing in it (a bit flipped, a file cut short or removed, a disk that is full
after so many bytes, another upstream stage, ...), and runs the command that would read or write it. Where the command
is refused, what was broken is put back and the command has to give the sound result: nothing finished was lost.
Prints one JSON object on stdout, a table on stderr; exit code 1 where an outcome was another one.

    python scripts/reliability/faults.py --tries 20
"""

import argparse
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from rich.table import Table
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
from bench_runs import cut_photographs
from printing import print_result

from mucs_cli.cli import main as mucs_main

SIDE = 16
TRAINING = ["training.num_steps=6", "training.warmup_steps=1", "training.batch_size=16", "model.width=16"]
DIGITS = ["experiment=digits", "device=cpu", "data.limit=48", "data.holdout=8", *TRAINING]
PHOTOS = ["data=image_folder", "model=dit", "model.size=tiny", "model.conditional=true", "device=cpu", *TRAINING]
SAMPLE = ["sampler.num_steps=2", "queries.num=2"]
UNLEARN = ["unlearning.num_steps=2", "unlearning.retain_batch_size=8", "unlearning.forget_batch_size=8"]
SCORE = [*UNLEARN, "noise_bank.num_draws=4", "score.batch_size=16"]
RACE = [*SCORE, "score.mode=adaptive", "score.top_k=10"]
DTRAK = ["method=dtrak", "method.num_draws=2", "method.num_projections=64"]
LDS = ["evaluation=lds", "evaluation.variants=[pixel]", "evaluation.num_subsets=3", "evaluation.num_resamples=100"]


@dataclass(frozen=True)
class Job:
    """A command on a run, and what it makes.

    run: the kind of run. arguments: without ``run=``. results: patterns below the run's folder.
    """

    run: str
    arguments: tuple[str, ...]
    results: tuple[str, ...] = ()


RESCORE = Job("digits", ("score", *SCORE, "method.epsilon=0.5"), ("score/*epsilon-0.5*/scores.safetensors",))
RERACE = Job("digits", ("score", *RACE, "method.epsilon=0.5"), ("score/*epsilon-0.5*/scores.safetensors",))
REDTRAK = Job("digits", ("score", *DTRAK, "method.damping=0.5"), ("score/*damping-0.5*/scores.safetensors",))
REUNLEARN = Job(
    "digits", ("unlearn", *UNLEARN, "unlearning.null_loss=monte_carlo"), ("unlearn/*monte_carlo*/query_*.safetensors",)
)
SHOW = Job("digits", ("show", "k=40", "variant=pixel", "format=json"))
REPORT = Job("digits", ("report", "report.k=3"), ("report/index.html",))
EVALUATE = Job("digits", ("evaluate", *LDS, "evaluation.num_draws=2"), ("evaluate/lds/table.csv",))
REEVALUATE = Job("digits", ("evaluate", *LDS, "evaluation.num_draws=3", "overwrite=true"), ("evaluate/lds/table.csv",))
VECTORS = Job("vectors", ("score", *SCORE), ("score/*/scores.safetensors",))

FILES: dict[str, tuple[str, Job]] = {
    "weights": ("train/model/*.safetensors", RESCORE),
    "network's configuration": ("train/model/config.json", RESCORE),
    "preconditioning": ("train/model/denoiser.json", RESCORE),
    "initial weights": ("train/initial.safetensors", REUNLEARN),
    "unlearned query": ("unlearn/*/query_*.safetensors", RESCORE),
    "samples": ("sample/samples.safetensors", RESCORE),
    "noise bank": ("noise_bank/*.safetensors", RESCORE),
    "base losses": ("score/_base/*/losses.safetensors", RESCORE),
    "base losses' manifest": ("score/_base/*/manifest.json", RESCORE),
    "growing losses": ("score/_growing/*/losses.growing", RERACE),
    "data cache": ("data/images.safetensors", RESCORE),
    "index": ("data/index.csv", SHOW),
    "score file": ("score/pixel/scores.safetensors", SHOW),
    "data's manifest": ("data/manifest.json", RESCORE),
    "model's manifest": ("train/manifest.json", RESCORE),
    "queries' manifest": ("sample/manifest.json", RESCORE),
    "unlearned models' manifest": ("unlearn/*/manifest.json", RESCORE),
    "scores' manifest": ("score/pixel/manifest.json", SHOW),
    "run.json": ("run.json", RESCORE),
    "machine.json": ("machine.json", RESCORE),
    "features": ("score/_features/*/features.safetensors", REDTRAK),
    "query's features": ("score/_features/*/query_*.safetensors", REDTRAK),
    "features' list": ("score/_features/*/queries.json", REDTRAK),
    "retrained model": ("retrain/*/model/*", REEVALUATE),
    "retrained model's manifest": ("retrain/*/manifest.json", REEVALUATE),
    "evaluation": ("evaluate/lds/*.*", EVALUATE),
    "evaluation, in a report": ("evaluate/lds/*.*", REPORT),
    "training curve": ("train/metrics.csv", REPORT),
    "condition vectors": ("data/conditions.safetensors", VECTORS),
    "user's condition file": ("../pictures/vectors.safetensors", VECTORS),
    "user's picture": ("../pictures/*/*.png", VECTORS),
}
"""Kind of file -> pattern below the run's folder, and the command that reads it."""


UNFINISHED = ("removed", "evaluation, in a report", "manifest.json")
"""Which makes the evaluation an unfinished one: a report leaves it out, with a warning."""


@dataclass
class Said:
    """What a command left: exit code (None for a traceback), stdout, stderr, and its files' bytes."""

    code: int | None
    out: str
    err: str
    files: dict[str, bytes] = field(default_factory=dict)

    @property
    def is_one_line(self) -> bool:
        errors = [line for line in self.err.splitlines() if line.startswith("mucs: error: ")]
        return self.code == 2 and len(errors) == 1 and "Traceback" not in self.err

    def equals(self, sound: "Said") -> bool:
        return self.code == 0 and self.files == sound.files and self.out == sound.out


# --- runs ------------------------------------------------------------------------------------------------------------


def call(run: Path, arguments: tuple[str, ...] | list[str], results: tuple[str, ...] = ()) -> Said:
    """A command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), console_on(err):
        try:
            code: int | None = mucs_main([arguments[0], f"run={run}", *arguments[1:]])
        except BaseException:
            code = None
            traceback.print_exc()
    files = {path.name: path.read_bytes() for pattern in results for path in run.glob(pattern)} if code == 0 else {}
    return Said(code, out.getvalue().replace(str(run), "RUN"), err.getvalue(), files)


@contextmanager
def console_on(stream: io.StringIO) -> Iterator[None]:
    """The log goes to a console that was made with the process's own stderr."""
    from mucs_cli.runtime import console

    before, console.file = console.file, stream
    try:
        yield
    finally:
        console.file = before


def make(place: Path, arguments: list[str]) -> None:
    said = call(place, arguments)
    if said.code != 0:
        raise SystemExit(f"cannot make the run: {said.err}")


def make_digits(run: Path) -> None:
    make(run, ["run", *DIGITS, *SAMPLE, *SCORE, "stages=[train,sample,unlearn,score]"])
    make(run, ["score", *RACE])
    make(run, ["score", *DTRAK])
    make(run, ["score", "method=pixel"])
    make(run, ["evaluate", *LDS, "evaluation.num_draws=2"])


def make_vectors(run: Path) -> None:
    pictures = run.parent / "pictures"
    cut_photographs(pictures, SIDE, distance=128)
    vectors = np.random.default_rng(0).normal(size=(len(list(pictures.rglob("*.png"))), 4)).astype(np.float32)
    save_file({"condition": vectors}, pictures / "vectors.safetensors")
    where = [f"data.path={pictures}", f"data.condition_file={pictures / 'vectors.safetensors'}"]
    make(run, ["run", *PHOTOS, *where, *SAMPLE, *UNLEARN, "stages=[train,sample,unlearn]"])


MAKERS = {"digits": make_digits, "vectors": make_vectors}


class Runs:
    """Finished runs, made when they are first asked for, with what sound commands make of them.

    Args:
        place: a folder for them.
    """

    def __init__(self, place: Path):
        self.place = place
        self.sounds: dict[Job, Said] = {}

    def folder(self, kind: str) -> Path:
        run = self.place / kind / "run"
        if not run.exists():
            MAKERS[kind](run)
        return run

    @contextmanager
    def copy(self, kind: str) -> Iterator[Path]:
        """A copy, with the user's own files beside it, at a path that is the same every time."""
        self.folder(kind)
        home, away = self.place / kind, self.place / f"{kind}-whole"
        home.rename(away)  # the run knows where its pictures are
        try:
            shutil.copytree(away, home, copy_function=shutil.copy2)
            yield home / "run"
        finally:
            shutil.rmtree(home)
            away.rename(home)

    def sound(self, job: Job) -> Said:
        if job not in self.sounds:
            with self.copy(job.run) as run:
                self.sounds[job] = call(run, job.arguments, job.results)
            if self.sounds[job].code != 0 or (job.results and not self.sounds[job].files):
                raise SystemExit(f"a sound run fails: {job}: {self.sounds[job].err}")
        return self.sounds[job]


# --- faults ----------------------------------------------------------------------------------------------------------


def flip(path: Path, chance: random.Random) -> None:
    """Turns one bit over; the file keeps its times, as on a disk that rots."""
    status, content = path.stat(), bytearray(path.read_bytes())
    if content:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def cut(path: Path, chance: random.Random) -> None:
    """Keeps the beginning only."""
    content = path.read_bytes()
    path.write_bytes(content[: chance.randrange(max(1, len(content)))])


def remove(path: Path, chance: random.Random) -> None:
    path.unlink()


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {"bit flipped": flip, "cut short": cut, "removed": remove}


def outcome_of(said: Said, sound: Said) -> str:
    if said.code == 0:
        return "same result" if said.equals(sound) else "OTHER RESULT"
    return "one line" if said.is_one_line else "CRASH"


def damage(runs: Runs, chance: random.Random, what: str, kind: str) -> tuple[str, str]:
    """One file broken, its reader called; the outcome, and what is to be said of a bad one."""
    pattern, job = FILES[kind]
    sound = runs.sound(job)
    with runs.copy(job.run) as run:
        paths = sorted(path for path in run.glob(pattern) if path.is_file())
        path = chance.choice([path for path in paths if (what, kind, path.name) != UNFINISHED])
        status, whole = path.stat(), path.read_bytes()
        DAMAGES[what](path, chance)
        said = call(run, job.arguments, job.results)
        outcome = outcome_of(said, sound)
        if outcome == "one line":
            path.write_bytes(whole)
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
            again = call(run, job.arguments, job.results)
            if not again.equals(sound):
                outcome, said = "LOST", again
        return outcome, f"{path}: {said.err}"


def full_disk(runs: Runs, chance: random.Random, job: Job) -> tuple[str, str]:
    """No file may grow beyond so many bytes; then the disk is freed, and the command goes on to the sound result."""
    sound = runs.sound(job)
    largest = max(map(len, sound.files.values()))
    with runs.copy(job.run) as run:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (chance.randrange(1, 2 * largest), hard))
        try:
            said = call(run, job.arguments, job.results)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        outcome = outcome_of(said, sound)
        if outcome == "one line":
            again = call(run, job.arguments, job.results)
            if not again.equals(sound):
                outcome, said = "LOST", again
        return outcome, said.err


FRESH = Job("digits", ("unlearn", *UNLEARN, "unlearning.forget_weight=0.3"), ("unlearn/*0.3*/query_*.safetensors",))
NEW_PIXELS = Job("digits", ("score", "method=random", "method.seed=3"), ("score/random*/scores.safetensors",))
MORE_QUERIES = Job("digits", ("sample", "sampler.num_steps=2", "queries.num=4"), ("sample/samples.safetensors",))
WRITERS = {
    "sampling": MORE_QUERIES,
    "unlearning": FRESH,
    "scoring": RESCORE,
    "a race": RERACE,
    "scores alone": NEW_PIXELS,
    "evaluation": REEVALUATE,
}

UPSTREAM = {
    "other weights, then sample": (["train", "training.seed=5", "overwrite=true"], ["sample"]),
    "other weights, then score": (["train", "training.seed=5", "overwrite=true"], ["score", *SCORE]),
    "other weights, then evaluate": (["train", "training.seed=5", "overwrite=true"], ["evaluate", *LDS]),
    "other queries, then unlearn": (["sample", "queries.seed=5", "overwrite=true"], ["unlearn", *UNLEARN]),
    "other queries, then score": (["sample", "queries.seed=5", "overwrite=true"], ["score", *SCORE]),
    "other queries, then show": (["sample", "queries.seed=5", "overwrite=true"], ["show", "variant=pixel"]),
    "other queries, then evaluate": (["sample", "queries.seed=5", "overwrite=true"], ["evaluate", *LDS]),
}


def upstream(runs: Runs, chance: random.Random, name: str) -> tuple[str, str]:
    """An earlier stage redone under a later one, which must not take it for what it was made with."""
    first, then = UPSTREAM[name]
    with runs.copy("digits") as run:
        make(run, first)
        said = call(run, then)
        return "one line" if said.is_one_line else "OTHER RESULT" if said.code == 0 else "CRASH", said.err


# --- several processes -----------------------------------------------------------------------------------------------


def start(run: Path, arguments: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mucs_cli", arguments[0], f"run={run}", *arguments[1:]]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str], run: Path, job: Job) -> Said:
    out, err = process.communicate(timeout=600)
    files = {path.name: path.read_bytes() for pattern in job.results for path in run.glob(pattern)}
    return Said(process.returncode, out.replace(str(run), "RUN"), err, files)


def two_at_once(runs: Runs, chance: random.Random, name: str) -> tuple[str, str]:
    """The same command twice: both end well, with the sound result; one that is to overwrite may be refused."""
    job = WRITERS[name]
    sound = runs.sound(job)
    with runs.copy(job.run) as run:
        processes = [start(run, list(job.arguments)) for _ in range(2)]
        both = [ended(process, run, job) for process in processes]
    refused = [said for said in both if said.is_one_line and "overwrite: got true, and process" in said.err]
    bad = [said for said in both if said not in refused and (said.code != 0 or said.files != sound.files)]
    if bad or len(refused) == len(both):
        return "OTHER RESULT", "".join(said.err for said in both)
    return ("one line" if refused else "same result"), ""


SLICES = ("0:1", "1:2")
"""All queries of a run."""


def sliced(job: Job) -> Job:
    """The job, whose results are to be whole: no slice may be left over."""
    return replace(job, results=(*job.results, "*/_slices/*/*.json"))


def two_slices(runs: Runs, chance: random.Random, name: str) -> tuple[str, str]:
    """Each half of a variant's queries in a command of its own: together they leave what one command does."""
    job = sliced(WRITERS[name])
    sound = runs.sound(job)
    with runs.copy(job.run) as run:
        processes = [start(run, [*job.arguments, f"queries.index={index}"]) for index in SLICES]
        both = [ended(process, run, job) for process in processes]
    if any(said.code != 0 for said in both) or both[-1].files != sound.files:
        return "OTHER RESULT", "".join(said.err for said in both)
    return "same result", ""


SWEEPS = {
    "side by side": ("method.epsilon=0.5,0.6,0.7",),
    "slices side by side": ("method.epsilon=0.5", f"queries.index={','.join(SLICES)}"),
}


def sweep(runs: Runs, chance: random.Random, name: str, is_killed: bool) -> tuple[str, str]:
    """Jobs that all need base losses which are not there; where one ``is_killed``, the sweep is typed again."""
    job = sliced(RESCORE)
    sound = runs.sound(job)
    command = ["score", "-m", *SCORE, *SWEEPS[name], "hydra/launcher=joblib", "hydra.launcher.n_jobs=3"]
    with runs.copy("digits") as run:
        shutil.rmtree(run / "score" / "_base")
        process = start(run, command)
        if is_killed:
            kill_holder(run, process)
            said = ended(process, run, job)
            if not said.is_one_line:
                return "CRASH", said.err
            process = start(run, command)
        said = ended(process, run, job)
        if said.code != 0 or said.files != sound.files:
            return "OTHER RESULT", said.err
        return ("one line" if is_killed else "same result"), ""


def kill_holder(run: Path, process: subprocess.Popen[str]) -> None:
    """Kills the first worker that holds a lock."""
    while process.poll() is None:
        for path in run.rglob(".*.lock"):
            try:
                holder = json.loads(path.read_text())["process"]
            except (OSError, ValueError):
                continue
            if holder != process.pid:
                os.kill(holder, signal.SIGKILL)
                return
        time.sleep(0.01)


# --- running ---------------------------------------------------------------------------------------------------------

Fault = Callable[[Runs, random.Random], tuple[str, str]]


def faults() -> dict[tuple[str, str], Fault]:
    """(fault, what it hits) -> one trial of it."""
    found: dict[tuple[str, str], Fault] = {}
    for what in DAMAGES:
        for kind in FILES:
            if (what, kind) != ("removed", "user's picture"):  # which is another data set, not a broken one
                found[what, kind] = partial(damage, what=what, kind=kind)
    for name, job in WRITERS.items():
        found["disk full", name] = partial(full_disk, job=job)
    for name in UPSTREAM:
        found["upstream changed", name] = partial(upstream, name=name)
    for name in WRITERS:
        found["two processes at once", name] = partial(two_at_once, name=name)
    for name in ("unlearning", "scoring", "a race"):
        found["two slices at once", name] = partial(two_slices, name=name)
    for name in SWEEPS:
        found["sweep", name] = partial(sweep, name=name, is_killed=False)
        found["sweep, a worker killed", name] = partial(sweep, name=name, is_killed=True)
    return found


GOOD = ("one line", "same result")
SLOW = ("upstream changed", "two processes at once", "two slices at once", "sweep", "sweep, a worker killed")
"""Faults whose trials take processes of their own, or redo a stage: a tenth as many."""


def try_all(place: Path, tries: int, seed: int, only: str = "") -> dict[tuple[str, str], Counter[str]]:
    """Outcomes of every fault whose names hold ``only``; the details of bad ones go to stderr."""
    runs = Runs(place)
    found: dict[tuple[str, str], Counter[str]] = {}
    for (what, kind), trial in faults().items():
        if only not in f"{what}: {kind}":
            continue
        outcomes = found[what, kind] = Counter()
        for number in range(max(1, tries // 10) if what in SLOW else tries):
            outcome, details = trial(runs, random.Random(f"{seed} {what} {kind} {number}"))
            outcomes[outcome] += 1
            if outcome not in GOOD:
                print(f"{what}: {kind}, try {number}: {outcome}\n{details}", file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=20, help="of each fault; a tenth where a trial takes processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="faults whose name holds this, for example 'disk full'")
    options = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        found = try_all(Path(place), options.tries, options.seed, options.only)
    table = Table("fault", "in", "tries", *GOOD, "other")
    for (what, kind), outcomes in found.items():
        good = [outcomes[name] for name in GOOD]
        table.add_row(what, kind, str(outcomes.total()), *map(str, good), str(outcomes.total() - sum(good)))
    total = sum(found.values(), Counter())
    bad = total.total() - sum(total[name] for name in GOOD)
    rows = {f"{what}: {kind}": dict(outcomes) for (what, kind), outcomes in found.items()}
    result = {"check": "faults", "seed": options.seed, "tries": total.total(), "bad": bad, "outcomes": rows}
    print_result(result | {"seconds": round(time.perf_counter() - started)}, table)
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
