"""The configuration a command works with: what the run was made with, plus what was typed on this command line.

``<run>/run.json`` keeps the composed configuration of the command that made the run, interpolations unresolved. A
later command starts from it, takes the sections that a finished stage decided from that stage's manifest, and applies
only the overrides typed now: the composed defaults never leak into an existing run.
"""

import copy
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING as DATACLASS_MISSING
from dataclasses import dataclass, field, fields, replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING, DictConfig, OmegaConf

from mucs_cli.composition import compose
from mucs_cli.config import (
    COMMANDS,
    SECTION_SCHEMAS,
    VARIANT_SECTIONS,
    PipelineConfig,
    is_section,
    result_config,
    schema_of,
    sections_of,
    validate,
)
from mucs_cli.errors import DamagedError, UserError
from mucs_cli.files import user_path
from mucs_cli.interpolations import fault
from mucs_cli.methods import METHODS
from mucs_cli.records import read_manifest, read_record

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

    from mucs_cli.methods.base import Method
    from mucs_cli.stage_folder import Stage

PER_COMMAND = ("run", "device", "threads", "overwrite", "tracker", "stages", "plan")
"""Keys that belong to one command line, not to the run; ``queries.index`` is another."""
MAY_BE_NAMES = (
    "data.text_encoder",
    "queries.condition_file",
    "method.path",
    "evaluation.clip_path",
    "evaluation.dino_path",
)
"""Keys that name a file or folder, or one on a hub or in another folder."""
RENAMED = {"training.checkpoint_every_seconds": "checkpoint.every_seconds"}
"""Keys that runs of earlier versions have recorded, and what they are called now; none changes a result."""
PATHS = (
    "data.path",
    "model.path",
    "queries.path",
    "evaluation.lpips_path",
    "evaluation.sscd_path",
    *MAY_BE_NAMES,
)
"""Keys that name a file or folder, relative to where the command is typed."""

MAX_VARIANT_NAME = 100


@dataclass(frozen=True)
class Context:
    """One command on one run.

    Args:
        command: the command; within ``mucs run``, the stage.
        config: the checked configuration, an instance of the command's schema.
        run: the run's folder, absolute.
        base: the run's own values of the sections that name variants: {section: {key: value}}.
        record: what run.json is to hold once a stage begins: the run's own configuration, with the sections that this
            command decides as they are now; empty for commands that only read.
        typed: the keys that were typed on this command line.
        made: folders that this command has made, the run's first.
    """

    command: str
    config: Any
    run: Path
    base: dict[str, dict[str, Any]] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    typed: tuple[str, ...] = ()
    made: tuple[Path, ...] = ()

    @classmethod
    def create(cls, command: str, cfg: DictConfig, overrides: list[str], cwd: Path) -> "Context":
        """Resolves the configuration of one command line.

        Args:
            command: a key of ``COMMANDS``.
            cfg: as Hydra composed it.
            overrides: those typed on this command line, as text.
            cwd: the folder where it was typed; relative paths start there.

        Raises:
            UserError: a value that cannot be; no such run; a value that a finished stage contradicts.
        """
        schema = COMMANDS[command].schema
        run = absolute(run_value(cfg), cwd)
        if not issubclass(schema, PipelineConfig):
            return cls(command, validate(cfg, schema), run)
        composed = as_values(cfg, cwd)
        stages = composed["stages"] if command == "run" else [command]
        path = run / "run.json"
        if path.exists():
            record = read_run_record(path)
        elif command in ("train", "run") or composed["model"]["name"] == "pretrained":
            record = {"experiment": chosen_experiment(), "config": base_values(command, composed, overrides, cwd)}
        else:
            raise UserError(
                str(path), f"not found; expected a run that `mucs train` made. Run it first: mucs train run={run}"
            )

        values = from_record(record, composed)
        finished = finished_sections(run, stages)
        for section, (_, decided) in finished.items():
            same_kind = values[section].get("name") == decided.get("name")
            values[section] = (values[section] if same_kind else {}) | decided
        for key in typed_keys(overrides, composed, finished):
            set_value(values, key, get_value(composed, key))
        config = validate(values, schema)
        typed = tuple(override.key_or_group for override in parse(overrides))
        if config.model.name == "pretrained":
            refuse_typed(typed, ("diffusion", "training"), "model=pretrained, which brings its own")
        if config.queries.name == "folder":
            refuse_typed(typed, ("sampler",), "queries=folder, where nothing is sampled")
        for section, (stage, decided) in finished.items():
            check_against(decided, section, config, stage, run)

        own = from_record(record, composed)
        if own["method"]["name"] != values["method"]["name"]:  # a method's variants are named against its own defaults
            own["method"] = as_values(compose(command, [f"method={config.method.name}"]), cwd)["method"]
            own["method"] = filled(own["method"], values["method"])
        base = validate(own, schema)
        owned = [section for stage in stages for section in COMMANDS[stage].owns]
        if "train" in stages:
            owned.append("seed")
        made = check_writable(run)
        return cls(
            command=command,
            config=config,
            run=run,
            # the names of scores that a race has settled say so, in a run that was made fast as well
            base={section: result_config(getattr(base, section)) for section in VARIANT_SECTIONS}
            | {"score": result_config(base.score) | {"mode": "exact"}},
            record=record | {"config": without_index(record["config"] | {key: values[key] for key in owned})},
            typed=typed,
            made=made,
        )

    def for_stage(self, stage: str) -> "Context":
        """The same configuration, for one of the stages of ``mucs run``."""
        return replace(self, command=stage)

    def folder(self, *parts: str) -> Path:
        """A folder or file of the run."""
        return self.run.joinpath(*parts)

    @property
    def method(self) -> "Method":
        """The attribution method that the configuration names."""
        return METHODS[self.config.method.name]

    @property
    def races(self) -> bool:
        """Whether scores are settled by racing over draws."""
        return self.config.score.mode == "adaptive" and self.method.can_race

    @property
    def score_sections(self) -> tuple[str, ...]:
        """The sections that decide the scores."""
        return (*self.method.sections, "score") if self.races or self.rounds else self.method.sections

    @property
    def rounds(self) -> bool:
        """Whether the losses that are compared are of another precision than float32."""
        return self.config.score.precision != "float32" and "noise_bank" in self.method.sections

    def score_variant(self) -> str:
        """The folder of the scores: the method's name and each value that decides them and differs from the run's."""
        return self._variant(self.score_sections)

    def unlearn_variant(self) -> str:
        """The folder of the unlearned models: ``mucs__forget_weight-0.5``; without the keys of scoring alone."""
        return self._variant(self.method.unlearning_sections(self.config), scores_only=False)

    def _variant(self, sections: tuple[str, ...], scores_only: bool = True) -> str:
        values = {section: result_config(getattr(self.config, section), scores_only) for section in sections}
        return variant_name(self.method.label(self.config), values, self.base)

    def stage(
        self,
        folder: Path,
        command: str,
        sections: tuple[str, ...] = (),
        inputs: Mapping[str, Any] | None = None,
        queries: Mapping[int, str | None] | None = None,
        may_grow: tuple[str, ...] = (),
        scores_only: bool = True,
        file_of: Callable[[int], str] | None = None,
        spent: Sequence[str] = (),
    ) -> "Stage":
        """The stage that fills ``folder``; when it begins, run.json is written first.

        Args:
            folder: where its files go.
            command: the command that fills it.
            sections: whose result-affecting values are part of its identity.
            inputs: fingerprints of what it reads.
            queries, may_grow, file_of, spent: see ``Stage``.
            scores_only: whether keys that change scores only are part of its identity.
        """
        from mucs_cli.stage_folder import Stage  # torch takes seconds to import; `mucs status` does without

        config = {section: result_config(getattr(self.config, section), scores_only) for section in sections}
        identity = {"config": config, "inputs": dict(inputs or {})}
        overwrite = self.config.overwrite
        return Stage(
            folder, command, identity, overwrite, self.write_record, queries, may_grow, file_of=file_of, spent=spent
        )

    def write_record(self) -> None:
        """Writes run.json where it is missing or says something else of the sections this command decides."""
        from mucs_cli.artifacts import write_record
        from mucs_cli.records import FORMAT_VERSION

        record = {"format_version": FORMAT_VERSION, **self.record}
        path = self.run / "run.json"
        if self.record and (not path.exists() or read_run_record(path) != record):
            write_record(path, record)


# --- values of a configuration: nested plain dicts, interpolations unresolved ----------------------------------------


def run_value(cfg: DictConfig) -> str:
    if OmegaConf.is_missing(cfg, "run"):
        raise UserError("run", "is not set; expected the run's folder. Add run=outputs/NAME to the command.")
    return str(cfg.run)


def absolute(path: str, cwd: Path) -> Path:
    return Path(os.path.abspath(cwd / user_path(path)))


def as_values(cfg: DictConfig, cwd: Path) -> dict[str, Any]:
    """Plain values, with paths made absolute: a later command may be typed in another folder.

    What may also be another name (a data set on a hub, a file in the data's folder) is a path where there is one.
    """
    values: dict[str, Any] = OmegaConf.to_container(cfg, resolve=False)  # type: ignore[assignment]
    for key in PATHS:
        text = OmegaConf.select(cfg, key, throw_on_missing=False)
        if text is None:
            continue
        path = absolute(str(text), cwd)
        may_be_a_name = key == "data.path" and cfg.data.name != "image_folder"
        if path.exists() or not (may_be_a_name or key in MAY_BE_NAMES):
            set_value(values, key, str(path))
    return values


def filled(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The values, and where they lack one that has no default, the given one."""
    return {key: given.get(key, value) if value == "???" else value for key, value in values.items()}


def own_values(section: str, plain: Mapping[str, Any], composed: Mapping[str, Any]) -> dict[str, Any]:
    """A section for run.json: what changes no number as typed; the rest, which names a variant, as if nothing was."""
    entries = fields(schema_of(section, composed, PipelineConfig))
    changes_nothing = [entry.name for entry in entries if not entry.metadata.get("affects_result", True)]
    return filled(plain, composed) | {key: composed[key] for key in changes_nothing}


def without_index(values: dict[str, Any]) -> dict[str, Any]:
    """The values with ``queries.index`` as it is by default."""
    return values | {"queries": values["queries"] | {"index": None}} if "queries" in values else values


def get_value(values: Mapping[str, Any], key: str) -> Any:
    return reduce(lambda node, part: node[part], key.split("."), values)


def set_value(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    reduce(lambda node, part: node[part], parents, values)[leaf] = value


def parse(overrides: list[str]) -> "list[Override]":
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return [o for o in OverridesParser.create().parse_overrides(overrides) if not o.is_hydra_override()]


def typed_keys(overrides: list[str], composed: Mapping[str, Any], finished: Iterable[str]) -> Iterator[str]:
    """The keys whose composed values were typed: a section for ``model=unet``, a leaf for ``model.width=64``.

    A group that is no section (``experiment=digits``, or one of the user's own) may set anything, so everything counts
    but what a finished stage decided.
    """
    for override in parse(overrides):
        key, value = override.key_or_group, override.value()
        if key in PER_COMMAND:
            continue
        if "." not in key and key not in composed:
            yield from (k for k in composed if k not in PER_COMMAND and k not in finished)
        elif isinstance(value, dict):
            yield from (f"{key}.{leaf}" for leaf in value)
        else:
            yield key


def base_values(command: str, composed: dict[str, Any], overrides: list[str], cwd: Path) -> dict[str, Any]:
    """The run's own configuration, for run.json: as composed, but without the typed values that only name a variant."""
    kept = [
        str(override.input_line)
        for override in parse(overrides)
        if "." not in override.key_or_group or override.key_or_group.split(".")[0] not in VARIANT_SECTIONS
    ]
    source = composed if len(kept) == len(parse(overrides)) else as_values(compose(command, kept), cwd)
    values = composed | {
        section: own_values(section, source[section], composed[section]) for section in VARIANT_SECTIONS
    }
    return without_index({key: value for key, value in values.items() if key not in PER_COMMAND})


def from_record(record: Mapping[str, Any], composed: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of an existing run, with this command line's own keys; a copy.

    What a run of an earlier version lacks is as by default, whatever was typed now.
    """
    own = {key: composed[key] for key in PER_COMMAND if key in composed}
    values = copy.deepcopy({**composed, **defaults_of(PipelineConfig), **record["config"], **own})
    for section in set(sections_of(PipelineConfig)) & set(record["config"]):
        if isinstance(values[section], dict):
            values[section] = defaults_of(schema_of(section, values[section], PipelineConfig)) | values[section]
    values["queries"]["index"] = composed["queries"]["index"]
    return values


def defaults_of(schema: type) -> dict[str, Any]:
    """The keys of a schema that have a default of their own, interpolations unresolved; sections left out."""
    found = {entry.name: entry.default for entry in fields(schema) if entry.default not in (DATACLASS_MISSING, MISSING)}
    return found | {
        entry.name: entry.default_factory()
        for entry in fields(schema)
        if entry.default_factory is not DATACLASS_MISSING and not is_section(entry)
    }


def read_run_record(path: Path) -> dict[str, Any]:
    """run.json of an existing run.

    Raises:
        UserError: it is damaged, or a section of it is of no kind that there is.
    """
    record = read_record(path)
    config = record.get("config")
    if not isinstance(config, dict):
        raise UserError(str(path), "got no configuration; expected the file that `mucs train` wrote. Use another run=.")
    rename_keys(config)
    for section in set(config) & set(sections_of(PipelineConfig)):
        values, kinds = config[section], SECTION_SCHEMAS.get(section)
        if not isinstance(values, dict) or (kinds and values.get("name") not in list(kinds)):
            expected = f"a section of the kind {' or '.join(kinds)}" if kinds else "a section of keys"
            raise UserError(
                str(path), f"got another {section} than mucs writes; expected {expected}. Use another run=."
            )
    refuse_unknown(config, path)
    refuse_references(config, path)
    return record


def refuse_unknown(config: Mapping[str, Any], path: Path) -> None:
    """Refuses recorded keys that are no keys of mucs, before anything is made of their values."""
    sections = set(sections_of(PipelineConfig))
    known = {entry.name for entry in fields(PipelineConfig)}
    unknown = [str(key) for key in config if key not in known | set(PER_COMMAND)]
    for section in sections & set(config):
        keys = {entry.name for entry in fields(schema_of(section, config[section], PipelineConfig))}
        unknown += [f"{section}.{key}" for key in config[section] if key not in keys]
    if unknown:
        raise UserError(str(path), f"got {unknown[0]}, no key of mucs. Leave it out, or use another run=.")


def refuse_references(config: Any, path: Path) -> None:
    """Refuses recorded values that would resolve to more than keys, the environment and the time."""
    if (wrong := fault(config)) is not None:
        key, what = wrong
        raise UserError(str(path), f"got {what}{key and f' in {key}'}; mucs does not resolve it. Use another run=.")


def rename_keys(config: dict[str, Any]) -> None:
    """Gives recorded keys their present names, in place."""
    for old, new in RENAMED.items():
        (section, key), (new_section, new_key) = old.split("."), new.split(".")
        if key in config.get(section, {}):
            config.setdefault(new_section, {}).setdefault(new_key, config[section].pop(key))


def chosen_experiment() -> str | None:
    from hydra.core.hydra_config import HydraConfig

    return HydraConfig.get().runtime.choices.get("experiment") if HydraConfig.initialized() else None


def refuse_typed(typed: Iterable[str], sections: tuple[str, ...], where: str) -> None:
    """Refuses typed keys of sections that would have no effect."""
    for key in typed:
        if key.partition(".")[0] in sections:
            raise UserError(key, f"has no effect with {where}. Leave it out.")


# --- finished stages -------------------------------------------------------------------------------------------------


def finished_sections(run: Path, stages: list[str]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Section -> the finished stage, other than ``stages``, that decided it, and the values its manifest records."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for stage, command in COMMANDS.items():
        path = run / stage / "manifest.json"
        if command.owns and stage not in stages and path.exists():
            config = read_manifest(path).get("config", {})
            wrong = [section for section in command.owns if not isinstance(config.get(section, {}), dict)]
            if wrong:
                raise DamagedError(str(path), f"got {wrong[0]} of another form than mucs writes. Use another run=.")
            refuse_references(config, path)
            found |= {section: (stage, config[section]) for section in command.owns if section in config}
    return found


def check_against(decided: Mapping[str, Any], section: str, config: Any, stage: str, run: Path) -> None:
    """Refuses a typed value that the finished stage which decided the section contradicts."""
    for key, value in result_config(getattr(config, section)).items():
        if key in decided and decided[key] != value:
            text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
            override = f"{section}={text}" if key == "name" else f"{section}.{key}={text}"
            raise UserError(
                f"{section}.{key}",
                f"got {value!r}; {run / stage / 'manifest.json'} has {decided[key]!r}. Use another run=, or redo that "
                f"stage: mucs {stage} run={run} {override} overwrite=true",
            )


def check_writable(run: Path) -> tuple[Path, ...]:
    """Refuses a run folder that cannot be made or written, before anything is computed; returns the folders it made."""
    try:
        missing = tuple(folder for folder in (run, *run.parents) if not folder.exists())
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            "run", f"got {run}, which cannot be created ({error.strerror}). Choose another run=."
        ) from error
    if not os.access(run, os.W_OK | os.X_OK):
        raise UserError("run", f"got {run}, which is not writable. Choose another run=, or change its permissions.")
    return missing


# --- variants --------------------------------------------------------------------------------------------------------


def variant_name(label: str, values: Mapping[str, Mapping[str, Any]], base: Mapping[str, Mapping[str, Any]]) -> str:
    """``<label>__<key>-<value>__...``: what differs from the run's own values, sorted by key; a valid file name.

    A key that two of the variant sections share is written with its section (``noise_bank.seed``); a name of more than
    100 characters is cut and ends in a hash.
    """
    shared = [key for section in VARIANT_SECTIONS for key in base.get(section, {})]
    parts = []
    for section, keys in values.items():
        for key, value in keys.items():
            if (section, key) != ("method", "name") and value != base[section][key]:
                parts.append(f"{section}.{key}-{spell(value)}" if shared.count(key) > 1 else f"{key}-{spell(value)}")
    name = "__".join([label, *sorted(parts)])
    if len(name) > MAX_VARIANT_NAME:
        name = f"{name[: MAX_VARIANT_NAME - 12]}__{short_hash(name)}"
    return name


def spell(value: Any) -> str:
    """A value as it can stand in a file name and in an override; what had to be replaced is told apart by a hash."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    if isinstance(value, list):
        return "+".join(map(spell, value)) or "none"
    text = str(value)
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", text)
    return safe if safe == text else f"{safe}.{short_hash(text)}"


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:10]
