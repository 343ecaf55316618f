"""What may be typed after a command: which keys and choices it knows, and what is refused before Hydra composes.

Errors are found here, from the schemas, rather than read out of Hydra's messages; what only composing can find (a wrong
type, a user's own file) is translated by ``as_user_error``.
"""

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from mucs_cli.config import COMMANDS, SECTION_SCHEMAS, PipelineConfig, known_keys, sections_of, type_name
from mucs_cli.errors import UserError, did_you_mean
from mucs_cli.user_files import CLOSED, CODE, refuse_packages

Groups = Mapping[str, list[str]]
"""Config group -> its options."""

LAUNCHERS = {"joblib": "joblib", "submitit_local": "submitit", "submitit_slurm": "submitit"}
"""Launchers that are installed apart -> the extra that brings them."""


def parse(overrides: list[str]) -> list[Override]:
    """Parsed overrides.

    Raises:
        UserError: one is not ``key=value``, in Hydra's grammar.
    """
    try:
        parsed: list[Override] = OverridesParser.create().parse_overrides(overrides)
    except OverrideParseException as error:
        raise UserError(
            error.override,
            f"cannot be read ({str(error).splitlines()[0]}); expected key=value. "
            "Put a value with special characters in quotes of its own: 'key=\"a value\"'.",
        ) from error
    for override in parsed:
        if not override.key_or_group:
            raise UserError(str(override.input_line), "got no key; expected key=value. Name the key.")
    return parsed


def check(command: str, overrides: list[Override], groups: Groups, sweeps: bool) -> None:
    """Refuses what this command does not know or use, and what would run code.

    Args:
        command: a key of ``COMMANDS``.
        overrides: as typed.
        groups: the groups and options there are.
        sweeps: whether a key may have several values (``-m``).

    Raises:
        UserError: naming the override, with the nearest key or choice.
    """
    for override in overrides:
        if CODE.search(str(override.input_line)) or CLOSED.search(str(override.input_line)):
            raise UserError(str(override.input_line), "is refused: it can run code or change the log. Leave it out.")
        key = override.key_or_group
        if re.split(r"[./]", key)[0] == "hydra":
            if key == "hydra.searchpath":
                refuse_packages(override.value(), "typed")
            continue
        if override.is_delete():
            raise UserError(
                str(override.input_line), "got a deletion; expected key=value. Set the key to null instead."
            )
        if override.is_sweep_override() and not sweeps:
            raise UserError(
                key, "got several values; expected one. Add -m for one job a value, or write a list as [1,2]."
            )
        for name in leaves(override):
            check_key(command, name, override, groups)
        if key in groups and not isinstance(override.value(), dict):
            check_choice(override, groups)


def leaves(override: Override) -> list[str]:
    """The keys an override sets: one, or those of a dictionary."""
    value = override.value()
    return [f"{override.key_or_group}.{key}" for key in value] if isinstance(value, dict) else [override.key_or_group]


def check_key(command: str, key: str, override: Override, groups: Groups) -> None:
    if key in words(command, groups):
        if override.is_add() and not override.is_force_add() and key not in own_groups(groups):
            raise UserError(str(override.input_line), f"got +; {key} is there already. Remove the +.")
        return
    users = [name for name in COMMANDS if key in words(name, groups)]
    if users:
        raise UserError(key, f"mucs {command} does not use it; give it to mucs {users[0]}.")
    same_leaf = [word for word in words(command, groups) if word.endswith(f".{key.split('.')[-1]}")]
    near = f" Did you mean '{same_leaf[0]}'?" if same_leaf else did_you_mean(key, words(command, groups))
    raise UserError(key, f"no such key of mucs {command}.{near or f' See mucs {command} --help.'}")


def words(command: str, groups: Groups) -> list[str]:
    """The keys and groups that may be typed after a command: its own, and those an earlier stage decided."""
    schema, stages = COMMANDS[command].schema, list(COMMANDS)
    earlier = [section for stage in stages[: stages.index(command)] for section in COMMANDS[stage].owns]
    usable = {*COMMANDS[command].sections, *earlier}
    keys = [key for key in known_keys(schema) if "." not in key or key.split(".")[0] in usable]
    if issubclass(schema, PipelineConfig):
        keys += [group for group in groups if group in usable or group == "experiment"] + own_groups(groups)
    return keys


def own_groups(groups: Groups) -> list[str]:
    """Groups that only the user's configuration folder has."""
    return [group for group in groups if group != "experiment" and group not in sections_of(PipelineConfig)]


def check_choice(override: Override, groups: Groups) -> None:
    group, options = override.key_or_group, groups[override.key_or_group]
    for value in values_of(override):
        for choice in value if isinstance(value, list) else [value]:
            if choice is not None and choice not in options:
                expected = f"expected {', '.join(options)}.{did_you_mean(str(choice), options)}"
                raise UserError(group, f"got {choice!r}; {expected}")


def values_of(override: Override) -> list[Any]:
    """The values of an override: one, or those of a sweep."""
    return list(override.sweep_iterator()) if override.is_sweep_override() else [override.value()]


# --- errors that only composing finds --------------------------------------------------------------------------------


def as_user_error(error: Exception, command: str, overrides: list[Override]) -> UserError:
    """One line for what Hydra, OmegaConf or the YAML reader found while composing."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        where = f"{error.problem_mark.name}:{error.problem_mark.line + 1}"
        return UserError(where, f"got invalid YAML ({error.problem}); expected key: value lines. Correct the file.")
    if isinstance(error, OSError) and error.filename is not None and not isinstance(error, HydraException):
        return UserError(str(error.filename), f"cannot be used ({error.strerror}). Choose another run= or folder.")
    chain: list[BaseException] = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(before)
    for cause in reversed(chain):
        if isinstance(cause, OmegaConfBaseException) and cause.full_key:
            where = next((found for link in chain if (found := source(link))), "")
            return composing_error(cause, str(cause.full_key), where, command, overrides)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, MissingConfigException):
        launcher = str(error.missing_cfg_file).removeprefix("hydra/launcher/")
        if launcher in LAUNCHERS:
            return UserError("hydra/launcher", f"needs {launcher}. Run pip install 'mucs[{LAUNCHERS[launcher]}]'.")
        options = ", ".join(lines[2:]).split(", Config search path")[0]
        return UserError("configuration", f"{lines[0]}; expected {options}. Name an existing one.")
    return UserError("configuration", f"{lines[0] if lines else repr(error)}. See mucs {command} --help.")


def source(error: BaseException) -> str:
    """`` (in experiment/mine)`` where Hydra says which file the error is in."""
    found = re.match(r"In '([^']+)'", str(error))
    return f" (in {found.group(1)})" if found else ""


def composing_error(
    cause: OmegaConfBaseException, key: str, where: str, command: str, overrides: list[Override]
) -> UserError:
    known = known_keys(COMMANDS[command].schema)
    section, _, leaf = key.partition(".")
    typed = [repr(override.value()) for override in overrides if override.key_or_group == key]
    typed += re.findall(r"^Value ('.*?') of type", str(cause))  # of a file
    got = f"got {typed[0]}; " if typed else ""
    if isinstance(cause, ConfigKeyError | AttributeError):
        kinds = [name for name, schema in SECTION_SCHEMAS.get(section, {}).items() if leaf in names(schema)]
        if kinds:
            return UserError(
                key,
                f"{got}only {' or '.join(f'{section}={kind}' for kind in kinds)} has it. Add it.",
            )
        near = " See mucs --hydra-help." if section == "hydra" else did_you_mean(key, known)
        return UserError(key, f"no such key{where}.{near}")
    if key in known:
        entry = known[key]
        return UserError(key, f"{got}expected {type_name(entry)}{where}: {entry.metadata['meaning']}.")
    return UserError(key, f"{got}{str(cause).splitlines()[0]}{where}. See mucs {command} --help.")


def names(schema: type) -> list[str]:
    return [entry.name for entry in fields(schema)]
