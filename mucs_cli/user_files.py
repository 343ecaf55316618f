"""A user's own folder of configuration files (``-cd``, ``-cp``, ``hydra.searchpath``), which may come from others.

What is typed is the user's own; a file may not run code, choose what programs load, or write anywhere. So below
``hydra`` it may choose and set a launcher and a sweeper, within bounds; all else there has to be as without the folder.
"""

import itertools
import math
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.types import Override
from omegaconf import ListConfig, OmegaConf

from mucs_cli.errors import UserError
from mucs_cli.files import read_regular
from mucs_cli.interpolations import children, fault, fault_of_text

HYDRAS_OWN = {
    "_target_": {
        "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
        "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
        "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher",
        "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher",
        "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher",
        "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper",
    },
    "class": {"logging.StreamHandler", "logging.FileHandler"},
    "()": set[str](),
}
"""Keys that name code to run -> the whole names that may stand there (a prefix would let others through)."""

CODE = re.compile(r"(?<!\w)(_target_|oc\.decode|oc\.create)(?!\w)")
"""What can name code in a value; the resolvers build a mapping out of text."""

CLOSED = re.compile(r"hydra[./](callbacks|job_logging|hydra_logging)(?!\w)")
"""Hydra's settings that run code by themselves, or would take the log away; not even typed."""

OPEN_TO_FILES = {"hydra.launcher", "hydra.sweeper", "hydra.searchpath"}
COMPUTED = {"hydra.runtime", "hydra.overrides", "hydra.mode", "hydra.job.override_dirname", "hydra.job.config_name"}
"""What Hydra fills in from the command line."""

CLOSED_TO_FILES: dict[str, Any] = {
    "hydra.launcher.additional_parameters": {},
    "hydra.launcher.setup": None,
    "hydra.launcher.submitit_folder": "${hydra.sweep.dir}/.submitit/%j",
    "hydra.launcher.temp_folder": None,
    "hydra.sweeper.custom_search_space": None,
    "hydra.sweeper.storage": None,
}
"""Settings of launchers and sweepers that start programs or write anywhere, with their harmless values."""

MOST_VALUES = 100_000
"""Of a configuration file, with its aliases written out."""
SWEPT = ("hydra.sweeper.params", "hydra.sweeper.search_space")
"""Overrides of a sweep's jobs: key -> values."""
ALLOWED_REFERENCE = re.compile(r"\$\{(?!\s*hydra\.(?!launcher|sweeper))")
"""A reference of a launcher or sweeper to what is no setting of Hydra's own.

They are resolved twice before an object is made of them: two harmless texts could make a third one, a reference again.
"""


def without_sweeps(overrides: list[Override], groups: Collection[str]) -> Iterator[list[str]]:
    """Each combination of the groups that are swept; swept values, which cannot bring in a file, are left out."""
    fixed = [str(o.input_line) for o in overrides if not o.is_sweep_override()]
    swept = [
        [f"{o.input_line.split('=')[0]}={value}" for value in o.sweep_string_iterator()]
        for o in overrides
        if o.is_sweep_override() and o.key_or_group in groups and o.input_line
    ]
    for combination in itertools.product(*swept):
        yield [*fixed, *combination]


def typed_of_hydra(overrides: list[Override]) -> list[str]:
    """The typed settings of Hydra's that a file may not set: what a configuration without the folder is made with."""
    files = tuple(f"{place}{end}" for place in OPEN_TO_FILES for end in (".", "/"))
    return [
        str(o.input_line)
        for o in overrides
        if not o.is_sweep_override()
        and (key := o.key_or_group.replace("/", ".")).startswith("hydra.")
        and not f"{key}.".startswith(files)
    ]


def searched_folders(overrides: list[Override]) -> list[Path]:
    """The folders of a typed ``hydra.searchpath``."""
    typed = [o.value() for o in overrides if o.key_or_group == "hydra.searchpath" and not o.is_sweep_override()]
    places = [place for value in typed for place in (value if isinstance(value, list) else [value])]
    return list(map(folder_of, places))


def folder_of(place: Any) -> Path:
    """The folder of a place in ``hydra.searchpath``."""
    return Path(str(place).removeprefix("file://"))


# --- packages --------------------------------------------------------------------------------------------------------


def refuse_packages(searchpath: Any, where: str) -> None:
    """Refuses places for configuration files other than folders: looking into a package imports, and so runs, it.

    Raises:
        UserError: naming the first.
    """
    for place in searchpath if isinstance(searchpath, list | ListConfig) else [searchpath]:
        if "://" in str(place) and not str(place).startswith("file://"):
            raise UserError(
                "hydra.searchpath", f"got {place} ({where}), which can run code; expected folders. Leave it out."
            )


def refuse_packages_of_files(command: str, flags: list[str], folders: list[Path]) -> None:
    """``refuse_packages`` and ``refuse_copies`` of what the user's own primary configuration says, before Hydra goes
    there."""
    names = [value for flag, value in itertools.pairwise(flags) if flag in ("-cn", "--config-name")]
    name = (names[-1] if names else command).removesuffix(".yaml")
    for path in (folder / f"{name}.yaml" for folder in folders):
        if path.is_file():
            content = OmegaConf.load(path)
            place = yaml.safe_load(OmegaConf.to_yaml(content))
            searchpath = place.get("hydra", {}) if isinstance(place, dict) else {}
            if (wrong := fault(searchpath)) is not None:
                raise UserError("hydra.searchpath", f"{path} gives it {wrong[1]}, which can run code. Leave it out.")
            places = OmegaConf.select(content, "hydra.searchpath") or []
            refuse_packages(places, str(path))
            refuse_copies(map(folder_of, places if isinstance(places, ListConfig) else [places]))


# --- what a file says ------------------------------------------------------------------------------------------------


def refuse_code(text: str, folder: str, without: str, typed: Collection[str], groups: Collection[str]) -> None:
    """Refuses a composed configuration that a file has made do more than set keys of mucs.

    Args:
        text: the configuration, as YAML.
        folder: where the user's files are, for the error.
        without: the same without the user's folder, with what is typed of Hydra's own settings.
        typed: keys that stand on the command line.
        groups: names that bring in files.
    Raises:
        UserError: naming the key.
    """
    config = yaml.safe_load(text)
    refuse_names_of_code(config, "", folder)
    hydra = config.get("hydra") or {}
    refuse_settings(hydra, yaml.safe_load(without)["hydra"], "hydra", folder)
    for section in ("launcher", "sweeper"):
        refuse_reach(hydra.get(section), f"hydra.{section}", folder, typed)
    refuse_swept_files(hydra, folder, groups)
    if (wrong := fault({key: value for key, value in config.items() if key != "hydra"})) is not None:
        raise UserError(wrong[0] or "configuration", f"{folder} gives it {wrong[1]}. Leave it out.")


def refuse_names_of_code(node: Any, path: str, folder: str) -> None:
    """Refuses what names code, or could be put together to name it, in any value."""
    if isinstance(node, str):
        found = CODE.search(node)
        what = found.group() if found else fault_of_text(node)
        if what is not None:
            raise UserError(path, f"{folder} gives it {what}, which can run code. Leave it out.")
    for key, value in children(node):
        where = f"{path}.{key}" if path else str(key)
        if key in HYDRAS_OWN and not (isinstance(value, str) and value in HYDRAS_OWN[key]):
            raise UserError(where, f"{folder} gives it {value!r}, which can run code. Leave it out.")
        refuse_names_of_code(value, where, folder)


def refuse_settings(node: Any, without: Any, path: str, folder: str) -> None:
    """Refuses settings of Hydra's other than those that there are without the folder."""
    if path in OPEN_TO_FILES | COMPUTED or node == without:
        return
    if node and without and isinstance(node, dict) and isinstance(without, dict):
        for key in {**without, **node}:
            refuse_settings(node.get(key), without.get(key), f"{path}.{key}", folder)
        return
    rest = (
        "which can run code or change the log. Leave it out."
        if CLOSED.search(path)
        else "a file may not set it. Type it on the command line if you want it."
    )
    raise UserError(path, f"{folder} gives it {node!r}; {rest}")


def refuse_reach(node: Any, path: str, folder: str, typed: Collection[str]) -> None:
    """Refuses settings of a launcher or sweeper that start programs, write anywhere, or refer to what files say."""
    is_typed = any(f"{key}.".startswith(f"{path}.") or path.startswith(f"{key}.") for key in typed)
    if path in CLOSED_TO_FILES and node != CLOSED_TO_FILES[path] and not is_typed:
        raise UserError(
            path, f"{folder} gives it {node!r}; a file may not set it. Type it on the command line if you want it."
        )
    if isinstance(node, str) and "\n" in node:
        raise UserError(path, f"{folder} gives it {node!r}, which can run code. Leave the line break out.")
    if isinstance(node, str) and not is_typed and ALLOWED_REFERENCE.search(node):
        raise UserError(path, f"{folder} gives it {node!r}; expected references to ${{hydra....}} only. Write it out.")
    for key, value in children(node):
        refuse_reach(value, f"{path}.{key}", folder, typed)


def refuse_swept_files(hydra: Mapping[str, Any], folder: str, groups: Collection[str]) -> None:
    """Refuses a file that sweeps over Hydra's settings, or over files, which are checked only where they are typed."""
    for path in SWEPT:
        swept = (hydra.get("sweeper") or {}).get(path.rpartition(".")[2]) or {}
        for key in map(str, swept if isinstance(swept, dict) else ()):
            if key in groups or not re.fullmatch(r"(?!hydra\b)[A-Za-z_]\w*(\.\w+)*", key):
                raise UserError(
                    f"{path}.{key}",
                    f"{folder} sweeps over it; expected a key of mucs that is no group. Type it instead.",
                )


# --- files that cannot be read ---------------------------------------------------------------------------------------


def refuse_copies(folders: Iterable[Path]) -> None:
    """Refuses a file that is short but holds very much: each alias (``*name``) can double what it names.

    Raises:
        UserError: naming the file.
    """
    for path in yaml_files(folders):
        try:
            text = read_regular(path)
            root = yaml.compose(text, Loader=yaml.SafeLoader) if has_aliases(text) else None
        except (OSError, ValueError, RecursionError, yaml.YAMLError):  # Hydra says what is wrong, where it is used
            continue
        known: dict[int, float] = {}
        if root is not None and num_values(root, known) - len(known) > MOST_VALUES:
            raise UserError(
                str(path), f"its aliases stand for more than {MOST_VALUES:,} values, or for themselves. Write it out."
            )


def has_aliases(text: bytes) -> bool:
    """Whether a YAML file has any; quickly, as most have none and may be long."""
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return (
        b"&" in text and b"*" in text and any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, loader))
    )


def num_values(node: yaml.Node, known: dict[int, float]) -> float:
    """How many values a node is with its aliases written out; infinitely many where it is in itself.

    Args:
        node: the node.
        known: takes the counts of all nodes in it, each once.
    """
    if id(node) not in known:
        known[id(node)] = math.inf
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        nodes = itertools.chain.from_iterable(part if isinstance(part, tuple) else (part,) for part in parts)
        known[id(node)] = 1 + sum(num_values(part, known) for part in nodes)
    return known[id(node)]


def yaml_files(folders: Iterable[Path]) -> Iterator[Path]:
    """The configuration files in folders, sorted; those behind links too, each once."""
    seen: set[Path] = set()
    for folder in folders:
        for place, inner, files in os.walk(folder, followlinks=True):
            here = Path(place).resolve()
            if here in seen:
                inner.clear()
                continue
            seen.add(here)
            inner.sort()
            yield from (Path(place) / name for name in sorted(files) if name.endswith(".yaml"))


def unreadable(error: Exception, folders: list[Path]) -> UserError:
    """One line for a file that is no text, or nested too deep for its reader."""
    if isinstance(error, RecursionError):
        return UserError("configuration", "a file is nested too deep, or refers to itself. Correct it.")
    for path in yaml_files(folders):
        try:
            read_regular(path).decode()
        except UnicodeDecodeError as wrong:
            return UserError(str(path), f"is not UTF-8 ({wrong.reason} at byte {wrong.start}). Save it as UTF-8.")
        except OSError:
            continue
    return UserError("configuration", f"a file is not UTF-8 ({error}). Save it as UTF-8.")
