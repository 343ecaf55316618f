"""The command line as a user meets it: help, completion, one-line errors, signals, sweeps, ``mucs status``."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.errors import MissingConfigException
from omegaconf.errors import OmegaConfBaseException

from mucs_cli import __version__
from mucs_cli.cli import job_error, main
from mucs_cli.config import COMMANDS, SECTION_SCHEMAS, known_keys
from mucs_cli.evaluation import EVALUATIONS
from mucs_cli.methods import METHODS
from mucs_cli.overrides import as_user_error
from mucs_cli.stages import status

TINY = ["experiment=digits", "run=r", "device=cpu", "data.limit=32", "training.num_steps=2", "training.warmup_steps=1"]


def mucs(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """The real program, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "mucs_cli", *arguments],
        cwd=cwd,
        env=os.environ | {"CI": "1"} | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, where the command is typed."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a user's error."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("mucs: error: ")
    return lines[0].removeprefix("mucs: error: ")


# --- help ------------------------------------------------------------------------------------------------------------


def test_help_and_version_come_without_hydra_or_torch(tmp_path: Path) -> None:
    script = (
        "import sys; from mucs_cli.cli import main\n"
        "codes = [main(['--help']), main(['--version']), main(['train', '--help']), main([])]\n"
        "print(codes, sorted({'torch', 'hydra'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[0, 0, 0, 0] []"
    assert f"mucs {__version__}\n" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_a_commands_help_lists_each_of_its_keys_with_its_meaning(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    for key, entry in known_keys(COMMANDS[command].schema).items():
        section = key.split(".")[0]
        if entry.name == "name" and section in SECTION_SCHEMAS:
            continue  # a group's choice, listed as such
        if "." not in key or section in COMMANDS[command].sections:
            assert f"{key}=" in text
            assert entry.metadata["meaning"].split()[0] in text
        else:
            assert f"  {key}=" not in text
    assert main(["help", command]) == 0
    assert capsys.readouterr().out == text


def test_help_has_a_methods_key_again_only_where_its_default_meaning_or_range_differ(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["score", "--help"]) == 0
    text = capsys.readouterr().out
    blocks = {block.splitlines()[0]: block for block in text.split("\n\n") if block.startswith("method=")}
    assert set(blocks) == {f"method={name}" for name in METHODS}
    assert text.count("  method.projection=sparse ") == 1  # five methods have it
    assert "  method.num_projections=4096 " in blocks["method=das"]  # the others': 32768
    assert text.count("  method.num_projections=32768 ") == 1
    for name, method in METHODS.items():
        words = set(re.split(r"[\s,.=]+", blocks[f"method={name}"]))
        assert {entry.name for entry in fields(method.schema)} - {"name"} <= words


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("trian", "trian: no such command; expected train, "),
        ("train run=r trainin.num_steps=3", "trainin.num_steps: no such key of mucs train. Did you mean 'training."),
        ("run run=r forget_weight=3", "forget_weight: no such key of mucs run. Did you mean 'unlearning.forget_"),
        ("train run=r training.num_steps=abc", "training.num_steps: got 'abc'; expected an integer: updates."),
        ("train run=r training.num_steps=0", "training.num_steps: got 0; expected at least 1"),
        ("train run=r +foo=1", "foo: no such key of mucs train."),
        ("train run=r ++training.foo=1", "training.foo: no such key of mucs train."),
        ("train run=r +seed=1", "+seed=1: got +; seed is there already. Remove the +."),
        ("train run=r ~seed", "~seed: got a deletion; expected key=value."),
        ("train run=r modle=unet", "modle: no such key of mucs train. Did you mean 'model'?"),
        ("train run=r model=unett", "model: got 'unett'; expected dit, pretrained, unet. Did you mean 'unet'?"),
        ("train run=r data.path=x", "data.path: got 'x'; only data=image_folder"),
        ("train", "run: is not set; expected the run's folder."),
        ("train run=r training.num_steps=${nope}", "training.num_steps: cannot be resolved: Interpolation key 'nope'"),
        ("train run=r training.num_steps=${x", "training.num_steps=${x: cannot be read "),
        ("train digits", "digits: cannot be read "),
        ("train run=r seed=1,2", "seed: got several values; expected one. Add -m"),
        ("train run=r --multirunn", "--multirunn: no such flag of mucs train. Did you mean '--multirun'?"),
        ("train run=r -cd", "-cd: got no value;"),
        ("train run=r -cd nowhere", "-cd: got nowhere; expected an existing folder"),
        ("train run=r unlearning.seed=1", "unlearning.seed: mucs train does not use it; give it to mucs unlearn."),
        ("sample run=r noise_bank.rho=1", "noise_bank.rho: mucs sample does not use it; give it to mucs unlearn."),
        ("train run=r method=mucs", "method: mucs train does not use it; give it to mucs unlearn."),
        ("train run=r evaluation.k=3", "evaluation.k: mucs train does not use it; give it to mucs evaluate."),
        ("score run=r method.path=x", "method.path: got 'x'; only method=clip or method=dino has it. Add it."),
        ("show run=r experiment=digits", "experiment: mucs show does not use it; give it to mucs train."),
        ("train run=r hydra.nope=1", "hydra.nope: no such key. See mucs --hydra-help."),
        ("train run=r queries.num=0", "queries.num: mucs train does not use it; give it to mucs sample."),
        ("run run=r queries.num=0", "queries.num: got 0; expected at least 1"),
        ("train run=r device=tpu", "device: got 'tpu'; expected one of auto, cpu, cuda."),
        ("train run=r -m --cfg job", "--cfg: got beside -m; expected one of -m, -r, --cfg, --info."),
        ("-sc install=fish", "-sc: got install=fish; expected install=bash."),
        ("status run=r", "run: got {here}/r; expected the folder of a run."),
        ("unlearn run=r", "{here}/r/run.json: not found;"),
        ("unlearn run='~nosuch/r'", "{here}/~nosuch/r/run.json: not found;"),
    ],
)  # fmt: skip
def test_a_users_error_is_one_line_that_names_the_key(
    arguments: str, message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert error_of(arguments.split(), capsys).startswith(message.format(here=here) if "{here}" in message else message)
    assert not [path for path in here.iterdir() if path.name != "r"]


def test_an_error_within_a_sweep_is_one_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "-m", "run=r", "training.num_steps=0,-1"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "job 1: mucs train run=r training.num_steps=0",
        "mucs: error: training.num_steps: got 0; expected at least 1: updates.",
    ]


def test_an_error_in_a_workers_job_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="needs the extra joblib")
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    done = mucs("train", "-m", "run=r", "training.num_steps=0,-1", *launcher, cwd=tmp_path)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("job ")]
    got = line.removeprefix("mucs: error: training.num_steps: got ").removesuffix("; expected at least 1: updates.")
    assert got in ("0", "-1")  # whichever job is the first to fail


def test_submitit_runs_the_jobs_of_a_sweep_in_processes_of_their_own(tmp_path: Path) -> None:
    """Where the queue is SLURM's, the same jobs are sent there."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs the extra submitit")
    tiny = ["experiment=digits", "device=cpu", "data.limit=32", "model.width=16", "training.num_steps=2"]
    done = mucs("train", "-m", "run=r-${seed}", "seed=1,2", "hydra/launcher=submitit_local", *tiny, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"r-{seed}/train/manifest.json").read_text()) for seed in (1, 2))
    assert first["outputs"] != second["outputs"]


def test_an_error_in_a_job_of_submitit_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs the extra submitit")
    done = mucs("train", "-m", "run=r", "training.num_steps=0,-1", "hydra/launcher=submitit_local", cwd=tmp_path)
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if line.startswith("mucs: error: ")] == [
        "mucs: error: training.num_steps: got 0; expected at least 1: updates."
    ]


def test_a_job_that_was_killed_is_one_line() -> None:
    text = "Job 17 (task: 0) with path /r/.submitit/17/17_0_result.pkl\nhas not produced any output (state: FAILED)"
    line = str(job_error(text))
    assert line.startswith("hydra.launcher: a job has ended without a result") and "\n" not in line


def test_a_launcher_that_is_not_installed_is_named_with_what_brings_it() -> None:
    missing = MissingConfigException("In 'hydra/launcher/slurm': Could not find", "hydra/launcher/submitit_slurm")
    line = str(as_user_error(missing, "unlearn", []))
    assert line == "hydra/launcher: needs submitit_slurm. Run pip install 'mucs[submitit]'."


def test_the_settings_for_slurm_compose(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs the extra submitit")
    slurm = ["hydra/launcher=slurm", "hydra.launcher.timeout_min=30"]
    assert main(["unlearn", "run=r", *slurm, "--cfg", "hydra", "-p", "hydra.launcher"]) == 0
    composed = yaml.safe_load(capsys.readouterr().out)
    assert composed["_target_"].endswith("SlurmLauncher")
    assert (composed["timeout_min"], composed["max_num_timeout"]) == (30, 100)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training:\n  num_steps: 3\n   decay: x\n", "{here}/conf/experiment/mine.yaml:5: got invalid YAML"),
        ("training:\n  num_stepz: 3\n", "training.num_stepz: no such key (in experiment/mine). Did you mean 'train"),
        ("training:\n  num_steps: few\n", "training.num_steps: got 'few'; expected an integer (in experiment/mine): "),
        ("defaults:\n  - override /model: nosuch\n", "configuration: In 'pipeline': Could not find 'model/nosuch'; "),
        ("training:\n  num_steps: -3\n", "training.num_steps: got -3; expected at least 1"),
        ("# \udcff\n", "{here}/conf/experiment/mine.yaml: is not UTF-8 (invalid start byte at byte 29)."),
        (f"x: {'[' * 3000}\n", "configuration: a file is nested too deep"),
    ],
)  # fmt: skip
def test_an_error_in_a_users_own_file_is_one_line(
    text: str, message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "conf" / "experiment").mkdir(parents=True)
    content = f"# @package _global_\nrun: r\n{text}".encode(errors="surrogateescape")
    (here / "conf" / "experiment" / "mine.yaml").write_bytes(content)
    assert error_of(["train", "-cd", "conf", "experiment=mine"], capsys).startswith(
        message.replace("{here}", str(here))
    )


def test_a_users_own_experiment_is_used(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "conf" / "experiment").mkdir(parents=True)
    (here / "conf" / "experiment" / "mine.yaml").write_text("# @package _global_\nrun: mine\nseed: 12\n")
    for flags in (["-cd", "conf"], ["hydra.searchpath=[conf]"], [f"hydra.searchpath=[file://{here}/conf]"]):
        assert main(["train", "experiment=mine", *flags, "--cfg", "job"]) == 0
        assert "run: mine\nseed: 12\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ("{callbacks: {x: {_target_: os.system}}}", "hydra.callbacks.x._target_"),
        ("{launcher: {_target_: mucs_cli.cli.main}}", "hydra.launcher._target_"),
        ("{job_logging: {handlers: {x: {class: subprocess.Popen}}}}", "hydra.job_logging.handlers.x.class"),
        ("{job_logging: {formatters: {x: {(): os.system}}}}", "hydra.job_logging.formatters.x.()"),
        ("{callbacks: \"${oc.decode:'{x:1}'}\"}", "hydra.callbacks"),
        (
            "{sweeper: {_target_: hydra._internal.core_plugins.basic_sweeper.BasicSweeper.__init__}}",
            "hydra.sweeper._target_",
        ),
    ],
)
@pytest.mark.parametrize("flags", [["experiment=mine"], ["-m", "experiment=digits,mine"]])
def test_a_users_file_cannot_name_code_to_run(
    settings: str, key: str, flags: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "conf" / "experiment").mkdir(parents=True)
    (here / "conf" / "experiment" / "mine.yaml").write_text(f"# @package _global_\nrun: r\nhydra: {settings}\n")
    line = error_of(["train", "-cd", "conf", *flags], capsys)
    assert line.startswith(f"{key}: {here}/conf gives it ")
    assert line.endswith("which can run code. Leave it out.")


@pytest.mark.parametrize(
    "override",
    [
        "hydra.launcher._target_=os.system",
        "+hydra.callbacks.x={_target_:os.system}",
        "+hydra/callbacks=x",
        "hydra.job_logging={}",
        "+training.x={_target_:os.system}",
    ],
)
def test_an_override_cannot_name_code_to_run(override: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert error_of(["train", "run=r", override], capsys).startswith(f"{override}: is refused")


def test_a_pickled_job_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = error_of(["train", "run=r", "--experimental-rerun=job.pickle"], capsys)
    assert line.startswith("--experimental-rerun: no such flag")


@pytest.mark.parametrize(
    "error", [RuntimeError("a bug"), OmegaConfBaseException("a bug in our use of a library"), OSError(1, "x")]
)
def test_a_bug_is_not_dressed_as_a_users_error(error: Exception, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(context: Any) -> None:
        raise error

    monkeypatch.setattr(status, "run", broken)
    with pytest.raises(type(error)):  # what leaves main ends the process with a traceback and exit code 1
        main(["status", "run=r"])


# --- what a command leaves behind ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_says_how_to_go_on(number: int, code: int, tmp_path: Path) -> None:
    arguments = [
        "train",
        "experiment=digits",
        "run=r",
        "device=cpu",
        "data.limit=32",
        "checkpoint.every_seconds=0.2",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "mucs_cli", *arguments],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what it puts into the background, such as these tests, with the interrupt ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    limit = time.monotonic() + 90
    while not (tmp_path / "r" / "train" / "checkpoint").exists():
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=300)
    assert process.returncode == code
    assert "Traceback" not in said
    assert said.splitlines()[-1].endswith("To go on, run it again: mucs " + " ".join(arguments))
    assert not (tmp_path / "r" / "train" / "manifest.json").exists()


def test_a_sweep_writes_only_into_the_runs_folder(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *TINY]) == 0
    assert main(["sample", "run=r", "-m", "queries.num=1"]) == 0  # the flag last, as Hydra itself would not have it
    assert [path.name for path in here.iterdir()] == ["r"]
    assert len(list(here.glob("r/sweeps/sample/*/multirun.yaml"))) == 1
    assert (here / "r" / "sample" / "manifest.json").is_file()


@pytest.mark.parametrize("run", ["o/seed-${seed}", "o/a,o/b"])
def test_a_sweep_over_runs_leaves_nothing_in_a_run_that_nobody_asked_for(
    run: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(here / "tmp"))
    assert main(["train", "-m", f"run={run}", "seed=1,2", *TINY[:1], "training.num_steps=-1"]) == 2
    assert len(list(here.glob("tmp/mucs/sweeps/train/*/multirun.yaml"))) == 1
    assert {path.name for path in here.iterdir()} <= {"o", "tmp"} and not list(here.glob("o/**/multirun.yaml"))
    assert not (here / "o" / "seed-0").exists()


def test_a_run_is_done_once_and_its_status_told_and_cleaned(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *TINY, "sampler.num_steps=2", "queries.num=1", "stages=[train,sample]"]) == 0
    capsys.readouterr()
    assert main(["run", "run=r", "stages=[train,sample]"]) == 0
    said = capsys.readouterr().err
    assert "train: up to date" in said and "sample: up to date" in said

    (here / "r" / "unlearn" / "mucs").mkdir(parents=True)
    (here / "r" / "unlearn" / "mucs" / "state.json").write_text(json.dumps({"stage": "unlearn"}))
    (here / "r" / "train" / "checkpoint").mkdir()
    (here / "r" / "train" / "checkpoint" / "state.safetensors").write_bytes(b"x" * 5000)
    assert main(["status", "run=r"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert "done" in rows["train"] and "4.9 KiB" in rows["train"]
    assert "unfinished" in rows["unlearn/mucs"]
    assert "absent" in rows["report"]

    images = (here / "r" / "data" / "images.safetensors").stat().st_size
    assert main(["status", "run=r", "clean=true"]) == 0
    assert f"({5000 + images} bytes)" in capsys.readouterr().out
    assert not (here / "r" / "train" / "checkpoint").exists()
    assert (here / "r" / "unlearn" / "mucs" / "state.json").exists()
    assert main(["sample", "run=r"]) == 0
    assert "sample: up to date" in capsys.readouterr().err


def test_the_status_of_a_run_of_somebody_elses_model_has_no_training(tmp_path: Path) -> None:
    for name, listed in (("pretrained", False), ("dit", True)):
        (tmp_path / "run.json").write_text(json.dumps({"config": {"model": {"name": name}}}))
        assert ("train" in [entry.name for entry in status.entries_of(tmp_path)]) is listed


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("report.k=31", "report.k: got 31; expected at most 30"),
        ("report.group_k=31", "report.group_k: got 31; expected at most 30"),
        ("report.group_by=[lable]", "report.group_by: got 'lable'; expected one of label. Did you mean 'label'?"),
        ("score.group_by=[lable]", "score.group_by: got 'lable'; expected one of label."),
    ],
)
def test_a_run_refuses_what_its_last_stages_cannot_do_before_it_trains(
    key: str, message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = ["data.limit=30", "report.k=5"]
    assert error_of(["run", *TINY, *size, key], capsys).startswith(message)
    assert not (here / "r" / "train").exists()
    assert main(["run", *TINY, *size, key, "stages=[train]"]) == 0  # which asks for none of it


def test_cleaning_leaves_what_unfinished_stages_need(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    (folder / "checkpoint").mkdir(parents=True)
    (folder / "checkpoint" / "state.safetensors").write_bytes(b"x")
    (folder / "scores.safetensors.partial").write_bytes(b"x")
    assert status.entry_of(tmp_path, folder, [folder / "checkpoint"]).cleanable == ()
    (folder / "manifest.json").write_text(json.dumps({"stage": "train"}))
    assert set(status.entry_of(tmp_path, folder, [folder / "checkpoint"]).cleanable) == {
        folder / "checkpoint",
        folder / "scores.safetensors.partial",
    }


def test_cleaning_never_goes_through_a_link(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other, run = tmp_path / "digits", tmp_path / "run"
    for folder in (other / "data", other / "base" / "a", other / "checkpoint", run / "train", run / "score" / "_own"):
        folder.mkdir(parents=True)
    for folder in (other / "data", other / "base" / "a", run / "train"):
        (folder / "manifest.json").write_text('{"stage": "score"}')
    for name in ("data/x.partial", "data/images.safetensors", "base/a/x", "checkpoint/x"):
        (other / name).write_bytes(b"x" * 1000)
    (run / "score" / "_base").symlink_to(other)
    (run / "score" / "_features").symlink_to(other / "base")
    (run / "score" / "_own" / "a").symlink_to(other / "base" / "a")
    (run / "train" / "checkpoint").symlink_to(other / "checkpoint")
    (run / "train" / "x.partial").symlink_to(other / "data" / "x.partial")
    (run / "data").symlink_to(other / "data")
    before = sorted(path for path in tmp_path.rglob("*"))
    assert main(["status", f"run={run}", "clean=true"]) == 0
    out = capsys.readouterr().out
    assert "deleted 0 B (0 bytes)" in out
    for name in ("data", "train", "score/_base/data", "score/_features/a", "score/_own/a"):
        assert re.search(rf"^{name} +done", out, re.MULTILINE), name
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_a_state_of_another_hand_is_shown_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train").mkdir()
    line = json.dumps({"done": 1, "total": 2, "unit": "[/x]\x1b[2J"})
    (tmp_path / "train" / "progress.jsonl").write_text(f"{line}\n")
    assert main(["status", f"run={tmp_path}"]) == 0
    assert "unfinished, 1 of 2 [/x]\\x1b[2J" in capsys.readouterr().out


def test_a_later_command_accepts_keys_of_the_runs_own_kind_of_model(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *TINY, "model=unet", "model.channels=4", "model.conditional=false"]) == 0
    capsys.readouterr()
    line = error_of(["sample", "run=r", "model.channels=8"], capsys)
    assert line.startswith(f"model.channels: got 8; {here}/r/train/manifest.json has 4.")


# --- completion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("mucs s", ["sample", "score", "show", "status"]),
        ("mucs train training.num", ["training.num_steps="]),
        ("mucs train run=r mod", ["model.", "model="]),
        ("mucs train -m model=", ["model=dit", "model=pretrained", "model=unet"]),
        ("mucs run experiment=d", ["experiment=digits", "experiment=digits_evaluation"]),
        ("mucs train training.decay=c", ["training.decay=constant", "training.decay=cosine"]),
        ("mucs show bottom=", ["bottom=true", "bottom=false"]),
        ("mucs e", ["evaluate"]),
        ("mucs evaluate evaluation=", [f"evaluation={name}" for name in EVALUATIONS]),
        ("mucs score run=r method=p", ["method=pixel"]),
        ("mucs nope run", []),
    ],
)
def test_completion_of_commands_keys_groups_and_choices(
    line: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMP_LINE", line)
    monkeypatch.setenv("COMP_POINT", str(len(line)))
    assert main(["-sc", "query=bash"]) == 0
    assert capsys.readouterr().out.split() == words


def test_the_shells_half_of_completion_is_for_mucs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-sc", "install=bash"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("-F hydra_bash_completion mucs")
