"""The command line: ``mucs COMMAND [group=option] [key=value] [flags]``, one Hydra application a command.

Help, version and completion of commands need neither Hydra nor torch, which are imported when a command runs. What a
user can cause ends in one line and exit code 2; a bug keeps its traceback.
"""

import contextlib
import errno
import io
import itertools
import multiprocessing
import os
import shlex
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mucs_cli import __version__, completion, help, interruption, processes, tracking
from mucs_cli.composition import conf_folder, group_options, register_schemas
from mucs_cli.config import COMMANDS, SECTION_SCHEMAS, PipelineConfig
from mucs_cli.errors import UserError, did_you_mean
from mucs_cli.files import user_path
from mucs_cli.records import read_record
from mucs_cli.text import printable

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

SWITCHES = ("-m", "--multirun", "-r", "--run", "--resolve", "--hydra-help")
WITH_VALUE = ("-c", "--cfg", "-p", "--package", "-cp", "--config-path", "-cn", "--config-name", "-cd", "--config-dir")
FOLDERS = ("-cp", "--config-path", "-cd", "--config-dir")
INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")

MODES = {"-m": "-m", "--multirun": "-m", "-r": "-r", "--run": "-r", "-c": "--cfg", "--cfg": "--cfg", "--info": "--info"}
"""Flags of which one may be given -> their usual names."""

ERROR = "mucs: error: "
"""What stands before the one line of an error."""

MACHINE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EMFILE),
)
"""Errors of the system that no code of ours can be to blame for."""
PERMISSION = (errno.EACCES, errno.EPERM)
"""Nor for these, where they name a file."""


class CommandFailed(SystemExit):
    """A user's error inside a command; it passes through Hydra and its launchers without their own messages.

    A launcher's job that it ends prints the line, so that the job's log has it.
    """

    def __init__(self, line: str):
        super().__init__(ERROR + line)
        self.line = line


def main(arguments: list[str] | None = None) -> int:
    """Runs one command line; returns the exit code.

    Args:
        arguments: what stands after ``mucs``; by default the process's own.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    # Read when torch is loaded. By default a waiting thread spins for milliseconds, which costs nothing on an idle
    # machine, but slows the command several times where other processes want the cores too.
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")
    try:
        with interruption.handled():
            code = dispatch(arguments)
            processes.stop()
            return code
    except (UserError, CommandFailed) as error:
        line = error.line if isinstance(error, CommandFailed) else str(error)
        if processes.claim_failure():
            print(ERROR + printable(line), file=sys.stderr)
        return 2
    except processes.Abandoned:
        return 2
    except interruption.INTERRUPTIONS as error:
        if processes.has_failed():  # the launcher ends the others with the one that failed
            return 2
        if processes.speaks():
            alone = os.environ.get("WORLD_SIZE", "1") == "1"
            again = "it again: " + shlex.join(["mucs", *arguments]) if alone else "the same command again"
            print(f"mucs: interrupted; what is finished is kept. To go on, run {again}", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 143
    except BrokenPipeError:  # the reader of our output, head for example, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception:
        processes.claim_failure()
        raise


def dispatch(arguments: list[str]) -> int:
    """Help, version and completion at once; everything else is a command."""
    command, *rest = arguments or ["--help"]
    if command == "help":
        command, rest = (rest[0], ["--help"]) if rest else ("--help", [])
    shared = command in COMMANDS and issubclass(COMMANDS[command].schema, PipelineConfig)
    if not shared and not processes.speaks():  # nothing that several processes could do together
        return 0
    if command in ("-h", "--help"):
        print(help.main_help(), end="")
    elif command == "--version" or "--version" in rest:
        print(f"mucs {__version__}")
    elif command in ("-sc", "--shell-completion"):
        shell_completion(rest)
    elif command not in COMMANDS:
        near = did_you_mean(command, COMMANDS)
        raise UserError(command, f"no such command; expected {', '.join(COMMANDS)}.{near or ' See mucs --help.'}")
    elif "-h" in rest or "--help" in rest:
        print(help.command_help(command), end="")
    else:
        run_application(command, *split_flags(command, rest))
    return 0


def split_flags(command: str, arguments: list[str]) -> tuple[list[str], list[str]]:
    """Hydra's flags, and the overrides: Hydra 1.3 wants the flags first.

    Raises:
        UserError: an unknown flag, or one that lacks its value.
    """
    flags: list[str] = []
    overrides: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        name, equals, _ = word.partition("=")
        if not word.startswith("-"):
            overrides.append(word)
        elif word == "--bottom" and command == "show":
            overrides.append("bottom=true")
        elif word in SWITCHES:
            flags.append(word)
        elif word in ("-i", "--info"):
            flags += ["--info", words.pop(0) if words and words[0] in INFO else "all"]
        elif name in WITH_VALUE and equals:
            flags += word.split("=", 1)
        elif name in WITH_VALUE and words:
            flags += [word, words.pop(0)]
        elif name in WITH_VALUE:
            raise UserError(word, f"got no value; expected one after it. See mucs {command} --help.")
        else:
            near = did_you_mean(name, (*SWITCHES, *WITH_VALUE, "--info"))
            raise UserError(name, f"no such flag of mucs {command}.{near or f' See mucs {command} --help.'}")
    modes = [MODES[word] for word in flags if word in MODES]
    if len(set(modes)) > 1:
        raise UserError(modes[1], f"got beside {modes[0]}; expected one of {', '.join(dict.fromkeys(MODES.values()))}.")
    for position, word in enumerate(flags[:-1]):
        if word in FOLDERS:
            flags[position + 1] = user_folder(word, flags[position + 1])
    return flags, overrides


def user_folder(flag: str, folder: str) -> str:
    """A configuration folder as an absolute path: Hydra would start from its own place for some."""
    path = user_path(folder).absolute()
    if not path.is_dir():
        raise UserError(flag, f"got {folder}; expected an existing folder of configuration files. Correct the path.")
    return str(path)


# --- one Hydra application a command ---------------------------------------------------------------------------------


def run_application(command: str, flags: list[str], typed: list[str]) -> None:
    """Checks what was typed, then composes and runs the command under Hydra.

    Raises:
        UserError: what was typed, or a file of the user's own, cannot be used.
        CommandFailed: a user's error within the command.
    """
    from concurrent.futures import BrokenExecutor

    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from mucs_cli import overrides, user_files

    parsed = overrides.parse(typed)
    folders = [Path(value) for flag, value in itertools.pairwise(flags) if flag in FOLDERS]
    folders += user_files.searched_folders(parsed)
    groups = group_options(folders)
    overrides.check(command, parsed, groups, sweeps="-m" in flags or "--multirun" in flags)
    recorded = recorded_kinds(command, parsed)

    def task(cfg: "DictConfig") -> None:
        run_command(command, recorded, cfg)

    try:
        if folders or any(override.key_or_group == "hydra.searchpath" for override in parsed):
            user_files.refuse_copies(folders)
            check_folders(command, flags, parsed, groups)
        hydra_main(command, [*flags, *recorded, *typed], task)
    except UserError:
        raise
    except BrokenExecutor as error:  # what joblib's own pool raises is one as well
        if hasattr(error, "raised_by_command"):
            raise
        raise UserError(
            "hydra.launcher",
            "a worker process has died, perhaps killed for its memory; expected it to end by itself. What is finished "
            "is kept: run it again, with fewer jobs at once if memory was short.",
        ) from error
    except (HydraException, OmegaConfBaseException, YAMLError, OSError) as error:
        if hasattr(error, "raised_by_command"):
            raise
        raise overrides.as_user_error(error, command, parsed) from error
    except (UnicodeDecodeError, RecursionError) as error:
        if hasattr(error, "raised_by_command"):
            raise
        raise user_files.unreadable(error, folders) from error
    except Exception as error:
        if type(error).__name__ != "UncompletedJobError":  # submitit's, which need not be installed
            raise
        raise job_error(str(error)) from error


def job_error(text: str) -> UserError | CommandFailed:
    """Why a job of submitit has no result: the line in its log, or that it was killed.

    Args:
        text: submitit's message, with the end of the log.
    """
    lines = [line.removeprefix(ERROR) for line in text.splitlines() if line.startswith(ERROR)]
    if lines:
        return CommandFailed(lines[-1])
    return UserError(
        "hydra.launcher",
        "a job has ended without a result, perhaps killed for its memory or time; its log is below "
        "hydra.launcher.submitit_folder. What is finished is kept: run it again.",
    )


def hydra_main(command: str, arguments: list[str], task: Any) -> None:
    import hydra

    register_schemas()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come up to here instead of ending the process with a page of text
    before, sys.argv = sys.argv, ["mucs", *arguments]
    try:
        hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name=command)(task)()
    finally:
        sys.argv = before


def recorded_kinds(command: str, typed: "list[Override]") -> list[str]:
    """Group choices of an existing run (``data=image_folder``), without which its keys could not be composed.

    They count as composed, not as typed. A run that is swept over, or that cannot be read, gives none.
    """
    given = {override.key_or_group: override for override in typed}
    if not issubclass(COMMANDS[command].schema, PipelineConfig) or "run" not in given or "experiment" in given:
        return []
    try:
        config = read_record(user_path(str(given["run"].value())) / "run.json")["config"]
        kinds = {
            section: str(config[section]["name"])
            for section in SECTION_SCHEMAS
            if section not in given and section in config
        }
    except (UserError, KeyError, TypeError):  # the command itself says what is wrong with the file
        return []
    return [f"{section}={kind}" for section, kind in kinds.items() if kind in SECTION_SCHEMAS[section]]


def check_folders(command: str, flags: list[str], typed: "list[Override]", groups: dict[str, list[str]]) -> None:
    """Refuses configuration files of the user's own that do more than set keys; composes them, without running."""
    from mucs_cli import user_files

    folders = [Path(value) for flag, value in itertools.pairwise(flags) if flag in FOLDERS]
    user_files.refuse_packages_of_files(command, flags, folders)
    paths: list[str] = []
    for flag, value in itertools.pairwise(flags):
        if flag in WITH_VALUE and flag not in ("-c", "--cfg", "-p", "--package"):
            paths += [flag, value]
    without = composed_text(command, user_files.typed_of_hydra(typed))
    keys = [override.key_or_group for override in typed]
    place = paths[-1] if paths else "hydra.searchpath"
    for combination in user_files.without_sweeps(typed, groups):
        user_files.refuse_code(composed_text(command, [*paths, *combination]), place, without, keys, groups)


def composed_text(command: str, arguments: list[str]) -> str:
    """The whole configuration that flags and overrides give, as YAML, nothing resolved."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        hydra_main(command, ["--cfg", "all", *arguments], lambda cfg: None)
    return text.getvalue()


def run_command(command: str, recorded: list[str], cfg: "DictConfig") -> None:
    """One job: what Hydra calls, in this process or in a launcher's worker.

    Args:
        command: a key of ``COMMANDS``.
        recorded: overrides that were put in front of those typed.
        cfg: the composed configuration.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    from mucs_cli import locks
    from mucs_cli.stages.context import Context
    from mucs_cli.stages.dispatch import run_stage

    job = HydraConfig.get()
    task = OmegaConf.to_container(job.overrides.task, resolve=False)  # ${...} in an override is text here
    assert isinstance(task, list)
    typed = [str(override) for override in task if override not in recorded]
    locks.command = shlex.join(["mucs", command, *typed])
    try:
        if issubclass(COMMANDS[command].schema, PipelineConfig):
            from mucs_cli import runtime

            runtime.set_up_logging()
            runtime.keep_freed_memory()
            if job.mode == RunMode.MULTIRUN:
                runtime.log.info("job %d: mucs %s %s", job.job.num + 1, command, " ".join(typed))
            join_processes()
        context = Context.create(command, cfg, typed, Path(job.runtime.cwd))
        tracking.use(getattr(context.config, "tracker", "none"))
        stage = "plan" if getattr(context.config, "plan", False) else command
        processes.meet()  # what is written from here on must not change what another process reads as its configuration
        run_stage(stage, context)
    except UserError as error:
        raise CommandFailed(str(error)) from None
    except Exception as error:
        if is_the_machines(error):
            raise CommandFailed(str(machine_error(error, locks.command))) from None
        error.__dict__["raised_by_command"] = True
        if multiprocessing.parent_process() is not None:  # the way back to the main process drops the traceback
            error.add_note(traceback.format_exc())
        raise
    finally:
        locks.release_all()


def is_the_machines(error: Exception) -> bool:
    """Whether an error tells of too little memory, a full disk, a file that may not be read or the like."""
    if isinstance(error, OSError):
        return error.errno in MACHINE or (error.errno in PERMISSION and error.filename is not None)
    return lacks_memory(error)


def lacks_memory(error: Exception) -> bool:
    if "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from mucs_cli.runtime import is_out_of_memory

    return is_out_of_memory(error)


def machine_error(error: Exception, doing: str) -> UserError:
    """One line for such an error.

    Args:
        error: the system's.
        doing: named where the error names no file.
    """
    if not isinstance(error, OSError):
        reason = str(error).strip().splitlines()
        return UserError(
            doing,
            f"needs more memory than there is ({reason[0] if reason else 'no more is known'}). Choose smaller batches, "
            "sizes or numbers, and run it again: what is finished is kept.",
        )
    return UserError(
        str(error.filename or doing),
        f"got the system's error {error.strerror!r}. Free the disk, or change permissions or the path, and run it "
        "again: what is finished is kept.",
    )


def join_processes() -> None:
    """Joins the processes that a launcher started with this one, and logs how many there are.

    Raises:
        UserError: they cannot be reached, or this is a worker that has none.
    """
    from mucs_cli.runtime import log

    count = processes.launched()
    if count > 1 and multiprocessing.parent_process() is not None:
        raise UserError(
            "hydra/launcher",
            f"got a launcher with workers of its own, within {count} processes of torchrun. Leave out one of the two.",
        )
    if processes.start():
        log.info("%d processes", count)
    elif count == 1 and any(name.startswith(("ACCELERATE_", "TORCHELASTIC_")) for name in os.environ):
        log.info("1 process: its launcher was asked for one, or makes no more on CPUs (torchrun does)")


# --- completion ------------------------------------------------------------------------------------------------------


def shell_completion(arguments: list[str]) -> None:
    """``-sc install=bash`` prints the shell's half, ``-sc query=bash`` answers it, with nothing for an unknown line."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    def forward(command: str) -> None:
        hydra_main(command, ["-sc", *arguments], lambda cfg: None)

    if arguments and arguments[0].startswith("query="):
        with contextlib.suppress(HydraException, OmegaConfBaseException, ValueError):
            completion.complete(forward)
    elif arguments and arguments[0] in ("install=bash", "uninstall=bash"):
        forward(next(iter(COMMANDS)))
    else:
        raise UserError(
            "-sc", f"got {' '.join(arguments) or 'nothing'}; expected install=bash. Run mucs -sc install=bash."
        )
