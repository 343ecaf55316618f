"""Nothing that is handed over runs code, leaves its folder, or acts on a terminal or in a spreadsheet."""

import csv
import json
import os
import shutil
import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
from commands import fails, mucs
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file
from sklearn.datasets import load_digits

from mucs_cli.cli import main
from mucs_cli.data.decode import Reading, decode
from mucs_cli.diffusion.checkpoint import load_denoiser
from mucs_cli.errors import UserError
from mucs_cli.records import read_record
from mucs_cli.reporting.tables import Table, print_table
from mucs_cli.runtime import log, stage_log
from mucs_cli.stages.growing_losses import create, is_of_shape

HOSTILE = "=cmd|' /C calc'!A0\x1b]0;owned\x07"
"""A formula for a spreadsheet, and a sequence that renames a terminal."""
ESCAPE = "\x1b"


# --- configuration ---------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the command is typed; modules there can be imported, as by ``python -m mucs_cli``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "evil_package").mkdir()
    (tmp_path / "evil_package" / "__init__.py").write_text("from pathlib import Path\nPath('acted').touch()\n")
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    yield tmp_path
    sys.modules.pop("evil_package", None)


@pytest.mark.parametrize(
    "primary",
    [
        "hydra: {searchpath: ['pkg://evil_package']}\n",
        "where: ['pkg://evil_package']\nhydra: {searchpath: '${where}'}\n",
        "hydra: {searchpath: ['pkg://evil_package'], callbacks: {x: {_target_: pathlib.Path.touch}}}\n",
    ],
)
@pytest.mark.parametrize("flags", [["-cd", "conf", "-cn", "mine"], ["-cp", "conf", "-cn", "mine.yaml"]])
def test_a_users_primary_file_cannot_import_a_package(
    primary: str, flags: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "conf" / "mine.yaml").write_text(f"defaults: [train, _self_]\n{primary}")
    line = fails(capsys, "train", "run=r", *flags)
    assert "hydra.searchpath: got pkg://evil_package" in line and "can run code" in line
    assert not (here / "acted").exists()


def test_a_package_as_a_place_of_files_is_refused_when_it_is_typed_too(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = fails(capsys, "train", "run=r", "hydra.searchpath=[pkg://evil_package]")
    assert "hydra.searchpath: got pkg://evil_package (typed)" in line
    assert not (here / "acted").exists()


@pytest.mark.parametrize("flags", [[], ["-m"]])
def test_what_a_users_file_names_as_code_has_not_run_when_it_is_refused(
    flags: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checks compose the file themselves: not even they may act."""
    settings = "{callbacks: {x: {_target_: pathlib.Path.touch, self: {_target_: pathlib.Path, _args_: [acted]}}}}"
    (here / "conf" / "experiment" / "mine.yaml").write_text(f"# @package _global_\nrun: r\nhydra: {settings}\n")
    assert "_target_" in fails(capsys, "train", "-cd", "conf", *flags, "experiment=mine")
    assert [path.name for path in here.iterdir() if path.name not in ("conf", "evil_package", "__pycache__")] == []


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ("{job: {env_set: {PATH: /evil}}}", "hydra.job.env_set"),
        ("{job: {chdir: true}}", "hydra.job.chdir"),
        ("{run: {dir: /elsewhere}}", "hydra.run.dir"),
        ("{output_subdir: x}", "hydra.output_subdir"),
        ("{job: {name: ../x}}", "hydra.job.name"),
        ("{env: {x: y}}", "hydra.env"),
        ("{help: {template: x}}", "hydra.help.template"),
        ("{sweep: {dir: /elsewhere}}", "hydra.sweep.dir"),
    ],
)
def test_settings_that_choose_programs_or_write_anywhere_may_be_typed_and_not_come_from_a_file(
    settings: str, key: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "conf" / "experiment" / "mine.yaml").write_text(f"# @package _global_\nrun: r\nhydra: {settings}\n")
    line = fails(capsys, "train", "-cd", "conf", "experiment=mine")
    assert f"{key}: {here}/conf gives it" in line and "Type it on the command line" in line
    (here / "conf" / "experiment" / "mine.yaml").write_text("# @package _global_\nrun: r\n")
    lists = {"hydra.env": "+hydra.env.x=y"}
    typed = {"hydra.job.env_set": "+hydra.job.env_set.MUCS_TRIED=x", **lists}.get(key, f"{key}=false")
    assert main(["train", "-cd", "conf", "experiment=mine", typed, "--cfg", "job"]) == 0


ASSEMBLED = (
    "{${oc.select:zz,_ta}rget_: pathlib.Path.touch, self: {${oc.select:zz,_ta}rget_: pathlib.Path, _args_: [acted]}}"
)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (f"{{callbacks: {{x: \"${{oc.${{oc.select:zz,decode}}:'{ASSEMBLED}'}}\"}}}}", "hydra.callbacks.x: "),
        ("{callbacks: {x: 1}}", "hydra.callbacks: "),
        (
            "{job_logging: {handlers: {x: {class: logging.FileHandler, filename: acted}}}}",
            "hydra.job_logging.handlers: ",
        ),
        ("{hydra_logging: {loggers: {x: {}}}}", "hydra.hydra_logging.loggers: "),
        ("{verbose: true}", "hydra.verbose: "),
        ("{sweeper: {params: {hydra.job_logging.version: '1'}}}", "hydra.sweeper.params.hydra.job_logging.version: "),
        ("{sweeper: {params: {experiment: 'digits,other'}}}", "hydra.sweeper.params.experiment: "),
        ("{sweeper: {params: {+seed: '1'}}}", "hydra.sweeper.params.+seed: "),
        ("{sweeper: {params: {seed: '${device}'}}}", "hydra.sweeper.params.seed: "),
    ],
)
def test_below_hydra_a_users_file_sets_a_launcher_and_a_sweeper_within_bounds_and_nothing_else(
    settings: str, message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "conf" / "experiment" / "mine.yaml").write_text(
        f"# @package _global_\nrun: r\ntraining: {{num_steps: -1}}\nhydra: {settings}\n"
    )
    assert f"mucs: error: {message}{here}/conf " in fails(capsys, "train", "-cd", "conf", "-m", "experiment=mine")
    assert not (here / "acted").exists()


def test_a_users_file_sweeps_over_keys_with_a_launcher_of_its_choice(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = "hydra: {sweeper: {max_batch_size: 2, params: {training.num_steps: '0,-1'}}}"
    (here / "conf" / "experiment" / "mine.yaml").write_text(f"# @package _global_\nrun: r\n{sweep}\n")
    assert "training.num_steps: got 0" in fails(capsys, "train", "-cd", "conf", "-m", "experiment=mine")


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("${oc.${oc.select:zz,env}:HOME}", "whose name is not written out"),
        ("${${oc.select:zz,seed}}", "whose name is not written out"),
        ("${os.system:x}", "the resolver os.system"),
        ("${seed" + "}${seed" * 30 + "}", "more than 20 references in a string"),
    ],
)
def test_a_reference_in_a_users_file_names_its_resolver(
    value: str, what: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "conf" / "experiment" / "mine.yaml").write_text(
        f"# @package _global_\nrun: r\ntraining: {{num_steps: -1}}\ndevice: '{value}'\n"
    )
    line = fails(capsys, "train", "-cd", "conf", "experiment=mine")
    assert line.startswith(f"mucs: error: device: {here}/conf gives it ") and what in line
    (here / "conf" / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nrun: '${oc.env:HOME}/${now:%Y}/${.seed}'\ndevice: ${oc.select:zz,cpu}\n"
    )
    assert main(["train", "-cd", "conf", "experiment=mine", "--cfg", "job"]) == 0


BOMB = "\n".join([f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" if n else "a0: &a0 [x]" for n in range(12)])


@pytest.mark.parametrize(
    ("way", "content"),
    [("-cd", BOMB), ("searchpath", BOMB), ("searchpath of a file", BOMB), ("-cd", "zz: &zz {a: 1, b: *zz}")],
)
def test_a_short_file_that_holds_very_much_is_refused_before_it_is_loaded(
    way: str, content: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "conf" / "experiment" / "mine.yaml").write_text(f"# @package _global_\nrun: r\n{content}\n")
    ways = {
        "-cd": ["-cd", "conf", "experiment=mine"],
        "searchpath": [f"hydra.searchpath=[{here}/conf]", "experiment=mine"],
        "searchpath of a file": ["-cp", "primary", "-cn", "mine"],
    }
    (here / "primary").mkdir()
    primary = (
        f"defaults: [train, {{override experiment: mine}}, _self_]\nhydra: {{searchpath: ['file://{here}/conf']}}\n"
    )
    (here / "primary" / "mine.yaml").write_text(primary)
    line = fails(capsys, "train", *ways[way])
    assert line.startswith(f"mucs: error: {here}/conf/experiment/mine.yaml: its aliases stand for more than 100,000")


def test_long_files_without_copies_are_read(here: Path) -> None:
    numbers = "".join(f"- {number}\n" for number in range(100_001))
    (here / "conf" / "long.yaml").write_text(f"# R&D, *not* an alias\n{numbers}")
    (here / "conf" / "named.yaml").write_text(f"a: &a [{'1, ' * 50_000}]\nb: *a\n")
    (here / "conf" / "deep.yaml").write_text(f"&a [*a, {'[' * 3_000}{']' * 3_000}]")
    (here / "conf" / "experiment" / "mine.yaml").write_text("# @package _global_\nrun: r\n")
    assert main(["train", "-cd", "conf", "experiment=mine", "--cfg", "job"]) == 0


def test_an_alias_in_a_users_file_is_read(here: Path) -> None:
    (here / "conf" / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nrun: r\nseed: &seed 7\ntraining: {num_steps: *seed}\n"
    )
    assert main(["train", "-cd", "conf", "experiment=mine", "--cfg", "job"]) == 0


def test_a_launchers_shell_commands_do_not_come_from_a_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs the launcher for clusters")
    for setting, key in (("setup: [touch acted]", "setup"), ('partition: "a\\ntouch acted"', "partition")):
        (here / "conf" / "experiment" / "mine.yaml").write_text(
            "# @package _global_\ndefaults: [override /hydra/launcher: submitit_slurm]\n"
            f"run: r\nhydra: {{launcher: {{{setting}}}}}\n"
        )
        assert f"hydra.launcher.{key}: " in fails(capsys, "train", "-cd", "conf", "-m", "experiment=mine")


# --- names, on a terminal, in a spreadsheet, in files ----------------------------------------------------------------


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on pictures whose names, classes and captions are what an attacker would choose."""
    place = tmp_path_factory.mktemp("hostile")
    pictures = place / "pictures"
    pictures.mkdir()
    rows = [["file_name", f"cap\rtion{ESCAPE}[2J", "artist"]]
    for number, digit in enumerate(load_digits().images[:24]):
        name = [f"{number}{HOSTILE.replace('/', '_')}.png", f"@{number}\r\n.png", f"[red]{number}[/x].png"][number % 3]
        (pictures / name).parent.mkdir(exist_ok=True)
        Image.fromarray((digit * 15).astype("uint8")).save(pictures / name)
        rows.append([name, HOSTILE, ["=1+1", "-2.5", "<script>alert(1)</script>"][number % 3]])
    with (pictures / "metadata.csv").open("w", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows(rows)
    data = [
        "data=image_folder",
        f"data.path={pictures}",
        "model=dit",
        "model.size=tiny",
        "model.width=16",
        "device=cpu",
    ]
    training = ["training.num_steps=2", "training.batch_size=8", "training.warmup_steps=1"]
    mucs(
        "run", f"run={place / 'run'}", *data, *training, "sampler.num_steps=2", "queries.num=1", "stages=[train,sample]"
    )
    mucs("score", f"run={place / 'run'}", "method=pixel")
    mucs("report", f"run={place / 'run'}", "report.k=3")
    return place / "run"


@pytest.mark.parametrize(
    "arguments",
    [
        ["show", "k=24"],
        ["show", "k=5", "group_by=artist"],
        ["status"],
        ["score", "method=random"],
        ["report", "report.k=2"],
    ],
)
def test_no_escape_reaches_the_terminal(
    arguments: list[str], hostile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(hostile, tmp_path / f"run[red]{ESCAPE}[2J[/x]"))
    (run / "score" / f"{ESCAPE}[2J[/x]").mkdir(parents=True)
    capsys.readouterr()
    assert main([arguments[0], f"run='{run}'", *arguments[1:]]) == 0
    said = capsys.readouterr()
    assert ESCAPE not in said.out + said.err and "\x07" not in said.out + said.err
    for path in run.rglob("log.txt"):
        assert ESCAPE not in path.read_text()


def test_an_error_about_a_hostile_name_is_one_harmless_line(
    hostile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = Path(shutil.copytree(hostile.parent / "pictures", tmp_path / "pictures"))
    (pictures / f"0{ESCAPE}[2J.png").write_bytes(b"no picture")
    line = fails(capsys, "train", f"run={tmp_path / 'run'}", "data=image_folder", f"data.path={pictures}")
    assert "0\\x1b[2J.png" in line and ESCAPE not in line


def test_a_tables_cells_and_headings_are_harmless_on_a_terminal() -> None:
    stream = StringIO()
    print_table(Table(f"a{ESCAPE}[2J", (f"b{ESCAPE}[2J",), [(f"[red]c{ESCAPE}[2J",)]), stream)
    assert ESCAPE not in stream.getvalue() and "[red]c\\x1b[2J" in stream.getvalue()


def test_tables_for_people_hold_no_formula_and_the_runs_own_records_hold_the_exact_text(
    hostile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (hostile / "data" / "index.csv").open(newline="") as file:
        index = list(csv.DictReader(file))
    caption = f"cap\ntion{ESCAPE}[2J"
    assert {row[caption] for row in index} == {HOSTILE}
    assert {row["artist"] for row in index} == {"=1+1", "-2.5", "<script>alert(1)</script>"}
    assert sum("\r\n" in row["file"] for row in index) == 8
    capsys.readouterr()
    mucs("show", f"run={hostile}", "variant=pixel", "k=24", "format=csv")
    shown = capsys.readouterr().out
    for text in ((hostile / "score" / "pixel" / "top.csv").read_bytes().decode(), shown):
        rows = list(csv.DictReader(StringIO(text, newline="")))
        assert len(rows) == 24
        assert {row["artist"] for row in rows} == {"'=1+1", "-2.5", "<script>alert(1)</script>"}
        assert {row[caption] for row in rows} == {f"'{HOSTILE}"}
        assert {row["file"][:2] for row in rows if "\r\n" in row["file"]} == {"'@"}
    mucs("show", f"run={hostile}", "variant=pixel", "k=24", "format=json")
    images = json.loads(capsys.readouterr().out)["queries"][0]["images"]
    assert {image["metadata"][caption] for image in images} == {HOSTILE}


def test_the_page_holds_hostile_names_as_text_under_a_policy_that_lets_nothing_run(hostile: Path) -> None:
    page = (hostile / "report" / "index.html").read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    policy = page.split('http-equiv="Content-Security-Policy" content="')[1].split('"')[0]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:"
    assert rules["style-src"].startswith("'sha256-") and "unsafe" not in policy and "http" not in policy
    assert not {"script-src", "connect-src", "frame-src", "object-src"} & set(rules)


def test_a_log_is_not_written_through_a_link(tmp_path: Path) -> None:
    victim = tmp_path / ".bashrc"
    victim.write_text("precious\n")
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "log.txt").symlink_to(victim)
    with pytest.raises(OSError), stage_log(tmp_path / "train"):
        log.info("rm -rf")
    assert victim.read_text() == "precious\n"


def test_growing_losses_are_not_written_through_a_link(tmp_path: Path) -> None:
    create(tmp_path / "victim", (2, 3))
    assert is_of_shape(tmp_path / "victim", (2, 3))
    (tmp_path / "losses.growing").symlink_to(tmp_path / "victim")
    assert not is_of_shape(tmp_path / "losses.growing", (2, 3))
    create(tmp_path / "losses.growing", (2, 3))  # in place of the link
    assert not (tmp_path / "losses.growing").is_symlink()


def test_a_command_on_a_run_whose_log_is_a_link_is_refused(
    hostile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(hostile, tmp_path / "run"))
    shutil.rmtree(run / "score" / "pixel")
    (run / "score" / "pixel").mkdir()
    (tmp_path / "victim").write_text("precious\n")
    (run / "score" / "pixel" / "log.txt").symlink_to(tmp_path / "victim")
    assert f"{run}/score/pixel/log.txt: got the system's error" in fails(capsys, "score", f"run={run}", "method=pixel")
    assert (tmp_path / "victim").read_text() == "precious\n"


# --- models and pictures ---------------------------------------------------------------------------------------------


def test_weights_that_are_not_finite_are_named(hostile: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(hostile / "train" / "model", tmp_path / "model"))
    weights = model / "diffusion_pytorch_model.safetensors"
    tensors = load_denoiser(model).network.state_dict()
    name = sorted(tensors)[0]
    for value in (float("nan"), float("inf")):
        tensors[name].view(-1)[0] = value
        save_file(tensors, weights)
        with pytest.raises(UserError, match=f"got values in {name} that are not finite"):
            load_denoiser(model)


def test_a_run_record_of_another_hand_is_refused_or_only_data(
    hostile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(hostile, tmp_path / "run"))
    record = read_record(run / "run.json")
    for changed in (
        {"model": {"name": ["dit"]}},
        {"model": [{"_target_": "os.system"}]},
        {"method": {"name": "mucs", "_target_": "os.system"}},
        {"unlearning": "${oc.decode:x}"},
        {"seed": "${"},
        {"seed": "${" * 1500 + "}" * 1500},
        {"seed": "${oc.${oc.select:zz,decode}:x}"},
        {"z0": "x" * 100} | {f"z{i + 1}": f"${{z{i}}}${{z{i}}}" for i in range(60)},
        {"score": {"group_by": ["x", *(f"${{score.group_by.{i}}}${{score.group_by.{i}}}" for i in range(60))]}},
        {"score": {"group_by": [f"${{score.group_by.{i + 1}}}" for i in range(3000)]}},
        {"score": {"group_by": [[f"${{score.group_by.{i + 1}}}"] * 2 for i in range(60)]}},
        {"score": {"nosuch": 1}},
    ):
        (run / "run.json").write_text(json.dumps(record | {"config": record["config"] | changed}))
        fails(capsys, "sample", f"run={run}")
    (run / "run.json").write_text(json.dumps(record))
    manifest = read_record(run / "train" / "manifest.json")
    for training in ([1], manifest["config"]["training"] | {"decay": "${oc.decode:x}"}):
        changed = manifest | {"config": manifest["config"] | {"training": training}}
        (run / "train" / "manifest.json").write_text(json.dumps(changed))
        assert f"{run}/train/manifest.json: got " in fails(capsys, "sample", f"run={run}")


def bomb(path: Path, **parts: object) -> Path:
    Image.new("L", (8, 8)).save(path, **parts)
    return path


READING = Reading(1, None, (255, 255, 255), 1000)


def test_metadata_of_a_picture_that_unpacks_to_very_much_is_refused(tmp_path: Path) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "a" * 80_000_000, zip=True)
    for path in (
        bomb(tmp_path / "text.png", pnginfo=text),
        bomb(tmp_path / "profile.png", icc_profile=b"\0" * 80_000_000),
    ):
        assert path.stat().st_size < 200_000
        with pytest.raises(UserError, match=r"\.png: cannot be read \(Decompressed data too large"):
            decode(path, str(path), READING)


def test_of_many_frames_the_first_is_read_and_a_frame_beyond_the_limit_refused(tmp_path: Path) -> None:
    frames = [Image.new("L", (8, 8), shade) for shade in range(200)]
    for suffix in ("gif", "tiff", "webp"):
        path = tmp_path / f"many.{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:])
        assert decode(path, str(path), READING).max() <= 1
        with pytest.raises(UserError, match="got 8x8 pixels; expected at most 63"):
            decode(path, str(path), Reading(1, None, (255, 255, 255), 63))


def test_inputs_are_read_and_never_written(hostile: Path, tmp_path: Path) -> None:
    """Folders of pictures and of models may be read-only: nothing in them is made, changed, or touched."""
    pictures = Path(shutil.copytree(hostile.parent / "pictures", tmp_path / "pictures"))
    model = Path(shutil.copytree(hostile / "train" / "model", tmp_path / "model"))
    queries = tmp_path / "queries"
    queries.mkdir()
    shutil.copy(next(pictures.glob("*.png")), queries / "a.png")
    folders = [tmp_path / name for name in ("pictures", "model", "queries")]
    everything = [path for folder in folders for path in (folder, *folder.rglob("*"))]
    for path in everything:
        path.chmod(0o555 if path.is_dir() else 0o444)

    def states() -> list[tuple[str, int, int]]:
        found = [path for folder in folders for path in (folder, *sorted(folder.rglob("*")))]
        return [(str(path), path.stat().st_mtime_ns, os.stat(path).st_size) for path in found]

    before = states()
    run = f"run={tmp_path / 'run'}"
    where = ["model=pretrained", f"model.path={model}", "data=image_folder", f"data.path={pictures}"]
    made = ["method=pixel", "stages=[sample,score,report]", "report.k=2", "device=cpu"]
    mucs("run", run, *where, "queries=folder", f"queries.path={queries}", *made)
    assert states() == before
