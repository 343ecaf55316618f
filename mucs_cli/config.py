"""The commands and their configurations, and the checks across keys.

Nothing here imports torch, so that help and completion answer at once.
"""

import os
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields, is_dataclass
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mucs_cli.errors import UserError, did_you_mean
from mucs_cli.evaluation import EVALUATIONS
from mucs_cli.methods import METHODS
from mucs_cli.schemas import (
    MOST,
    MOST_THREADS,
    CheckpointConfig,
    DataConfig,
    DDPMConfig,
    DiffusionConfig,
    DigitsConfig,
    DiTConfig,
    EDMConfig,
    EvaluationConfig,
    FolderQueriesConfig,
    HuggingFaceConfig,
    ImageFolderConfig,
    MethodConfig,
    ModelConfig,
    NoiseBankConfig,
    PretrainedConfig,
    QueriesConfig,
    ReportConfig,
    SampledQueriesConfig,
    SamplerConfig,
    ScoreConfig,
    TrainingConfig,
    UNetConfig,
    UnlearningConfig,
    VPConfig,
    option,
)

# --- commands --------------------------------------------------------------------------------------------------------


SCORE_MODES = {"faithful": "exact", "fast": "adaptive"}
"""``speed`` -> ``score.mode``, where that is not typed."""
OmegaConf.register_new_resolver("score_mode", lambda speed: SCORE_MODES.get(speed, "exact"), replace=True)


def sweep_folder(*, _root_: DictConfig) -> str:
    """Where a sweep keeps its multirun.yaml: its run's folder; a temporary one where each job has another.

    That is so where ``run`` is swept over, so that there is none yet or an experiment's, or refers to other keys, which
    may be swept over.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    typed = OverridesParser.create().parse_overrides(list(OmegaConf.select(_root_, "hydra.overrides.task") or []))
    is_swept = any(override.key_or_group == "run" and override.is_sweep_override() for override in typed)
    if is_swept or "run" not in _root_ or OmegaConf.is_interpolation(_root_, "run"):
        return f"{os.environ.get('TMPDIR') or '/tmp'}/mucs"
    return str(_root_["run"])


OmegaConf.register_new_resolver("sweep_folder", sweep_folder, replace=True)


@dataclass
class RootConfig:
    run: str = option(MISSING, "the run's folder, for example outputs/digits", affects_result=False)


@dataclass
class PipelineConfig(RootConfig):
    seed: int = option(0, "seed of everything that has no seed of its own")
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda"), affects_result=False)
    threads: int | None = option(
        None,
        "CPU threads of a process, which change results by rounding; null: as the run's first command, which took the "
        "cores or OMP_NUM_THREADS",
        minimum=1,
        maximum=MOST_THREADS,
        affects_result=False,
    )
    speed: str = option(
        "faithful",
        "faithful: scores as the paper's; fast: the same highest ones at a fraction of the cost (score.mode=adaptive)",
        choices=tuple(SCORE_MODES),
        affects_result=False,
    )
    overwrite: bool = option(False, "redo a stage whose folder holds another result", affects_result=False)
    tracker: str = option(
        "none",
        "where progress is shown besides the log and progress.jsonl: none, or tensorboard, which writes "
        "tensorboard/ in the stage's folder",
        choices=("none", "tensorboard"),
        affects_result=False,
    )
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    queries: QueriesConfig = field(default_factory=QueriesConfig)
    noise_bank: NoiseBankConfig = field(default_factory=NoiseBankConfig)
    unlearning: UnlearningConfig = field(default_factory=UnlearningConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    report: ReportConfig = field(default_factory=ReportConfig)


@dataclass
class PlannedCommandConfig(PipelineConfig):
    plan: bool = option(
        False,
        "only say what is to be computed, with predicted time, memory and disk; writes nothing to the run",
        affects_result=False,
    )


@dataclass
class RunCommandConfig(PlannedCommandConfig):
    stages: list[str] = option(
        ["train", "sample", "unlearn", "score", "report"], "stages to run, in this order", affects_result=False
    )


@dataclass
class ShowConfig(RootConfig):
    variant: str | None = option(None, "which scores: a folder name below score/; null: the only one, or mucs")
    query: int | None = option(None, "one query; null: all", minimum=0)
    k: int = option(10, "training images a query; with group_by, groups a query in the table", minimum=1)
    group_by: str | None = option(None, "sum the scores up by a metadata column, for example artist or label")
    group_k: int | None = option(
        None,
        "highest scores of a query of which each group's share is given; null: 1 % of the images, at least 10",
        minimum=1,
    )
    bottom: bool = option(False, "the lowest scores (images that speak against the query) instead of the highest")
    exclude_exact: bool = option(False, "leave exact copies of the query out of the ranking")
    format: str = option("table", "table, json or csv", choices=("table", "json", "csv"))


@dataclass
class StatusConfig(RootConfig):
    clean: bool = option(False, "delete what can be computed again: resumable checkpoints, base losses, decoded images")


@dataclass(frozen=True)
class Command:
    """A command: what it does, its schema, the sections it reads, and those whose values it decides."""

    summary: str
    schema: type
    sections: tuple[str, ...] = ()
    owns: tuple[str, ...] = ()


TRAIN_SECTIONS = ("data", "model", "diffusion", "training")
COMMANDS: dict[str, Command] = {
    "train": Command("train the base model", PlannedCommandConfig, (*TRAIN_SECTIONS, "checkpoint"), TRAIN_SECTIONS),
    "sample": Command(
        "generate the queries, or read them", PlannedCommandConfig, ("sampler", "queries"), ("sampler", "queries")
    ),
    "unlearn": Command(
        "one unlearned model a query", PlannedCommandConfig, ("method", "unlearning", "noise_bank", "checkpoint")
    ),
    "score": Command(
        "score every training image for every query",
        PlannedCommandConfig,
        ("method", "unlearning", "noise_bank", "score"),
    ),
    "evaluate": Command(
        "judge and compare the scores of several variants", PlannedCommandConfig, ("evaluation", "checkpoint")
    ),
    "report": Command("write the HTML report", PipelineConfig, ("report",)),
    "show": Command("print a query's top training images", ShowConfig),
    "run": Command(
        "run the stages in order, skipping what is up to date",
        RunCommandConfig,
        (
            *TRAIN_SECTIONS,
            "sampler",
            "queries",
            "method",
            "unlearning",
            "noise_bank",
            "score",
            "checkpoint",
            "evaluation",
            "report",
        ),
    ),
    "status": Command("what a run holds, its sizes, and what can be cleaned", StatusConfig),
}

VARIANT_SECTIONS = ("method", "unlearning", "noise_bank", "score")
"""Sections whose values, where they differ from the run's own, name a variant."""

NULL_LOSSES = ("auto", "closed_form", "monte_carlo", "none")
"""What unlearning.null_loss may be besides a number."""

SECTION_SCHEMAS: dict[str, dict[str, type]] = {
    "data": {"digits": DigitsConfig, "image_folder": ImageFolderConfig, "huggingface": HuggingFaceConfig},
    "model": {"dit": DiTConfig, "unet": UNetConfig, "pretrained": PretrainedConfig},
    "diffusion": {"edm": EDMConfig, "vp": VPConfig, "ddpm": DDPMConfig},
    "queries": {"sampled": SampledQueriesConfig, "folder": FolderQueriesConfig},
    "method": {name: method.schema for name, method in METHODS.items()},
    "evaluation": {name: evaluation.schema for name, evaluation in EVALUATIONS.items()},
}
"""Sections whose schema depends on their ``name``."""


# --- validation ------------------------------------------------------------------------------------------------------


def schema_of(section: str, value: Mapping[str, Any], root: type) -> type:
    """The dataclass of a section, chosen by its ``name`` where there are several."""
    if section in SECTION_SCHEMAS:
        by_name = SECTION_SCHEMAS[section]
        name = value.get("name", "???")
        if name not in by_name:
            raise UserError(f"{section}.name", f"got {name!r}; expected one of {', '.join(by_name)}.")
        return by_name[name]
    factory = next(f for f in fields(root) if f.name == section).default_factory
    assert isinstance(factory, type)
    return factory


def validate(config: Mapping[str, Any] | DictConfig, root: type) -> Any:
    """A checked instance of ``root`` from a composed configuration.

    Every interpolation is resolved; unknown keys, wrong types, values out of range and impossible combinations raise.

    Raises:
        UserError: naming the key, what it got and what was expected.
    """
    try:
        container: dict[str, Any] = OmegaConf.to_container(OmegaConf.create(config), resolve=True)  # type: ignore[arg-type,assignment]
    except OmegaConfBaseException as error:
        raise UserError(
            str(error.full_key or "config"), f"cannot be resolved: {str(error).splitlines()[0]}. Correct the reference."
        ) from error
    except RecursionError as error:
        raise UserError("config", "has references within references that never end. Correct them.") from error
    arguments: dict[str, Any] = {}
    known = {f.name: f for f in fields(root)}
    for key in container:
        if key not in known:
            raise UserError(str(key), f"no such key.{did_you_mean(str(key), known)}")
    scalars = {key: value for key, value in container.items() if not is_section(known[str(key)])}
    typed = to_schema(scalars, root, "")
    for name, entry in known.items():
        if is_section(entry):
            value = container.get(name) or {}
            section = to_schema(value, schema_of(name, value, root), f"{name}.")
            check_ranges(section, f"{name}.")
            arguments[name] = section
        else:
            arguments[name] = getattr(typed, name)
    result = root(**arguments)
    check_ranges(result, "")
    check_across(result)
    return result


def sections_of(root: type) -> list[str]:
    """Names of the fields of ``root`` that are sections."""
    return [f.name for f in fields(root) if is_section(f)]


def known_keys(root: type) -> dict[str, Field[Any]]:
    """Dotted key -> field, of a root schema and its sections; every kind of a section that has several counts."""
    known: dict[str, Field[Any]] = {}
    for entry in fields(root):
        if not is_section(entry):
            known[entry.name] = entry
            continue
        schemas = SECTION_SCHEMAS.get(entry.name, {"": entry.default_factory})
        for schema in schemas.values():
            known |= {f"{entry.name}.{f.name}": f for f in fields(schema)}  # type: ignore[arg-type]
    return known


def is_section(entry: Field[Any]) -> bool:
    return isinstance(entry.default_factory, type) and is_dataclass(entry.default_factory)


def to_schema(value: Mapping[str, Any], schema: type, prefix: str) -> Any:
    """An instance of ``schema`` filled with ``value``; keys and types are checked."""
    known = [f.name for f in fields(schema)]
    for key in value:
        if key not in known:
            raise UserError(f"{prefix}{key}", f"no such key.{did_you_mean(str(key), known)}")
    merged = OmegaConf.structured(schema)
    for key, item in value.items():
        entry = next(f for f in fields(schema) if f.name == key)
        if item == "???":
            continue
        try:
            OmegaConf.update(merged, str(key), item)
        except OmegaConfBaseException as error:
            raise UserError(
                f"{prefix}{key}", f"got {item!r}; expected {type_name(entry)}: {entry.metadata.get('meaning', '')}."
            ) from error
    arguments = {}
    for entry in fields(schema):
        if is_section(entry):
            continue
        if OmegaConf.is_missing(merged, entry.name):
            raise UserError(
                f"{prefix}{entry.name}",
                f"is not set; expected {entry.metadata['meaning']}. Add {prefix}{entry.name}=... to the command.",
            )
        item = value.get(entry.name) if OmegaConf.is_interpolation(merged, entry.name) else merged[entry.name]
        arguments[entry.name] = OmegaConf.to_container(item) if OmegaConf.is_config(item) else item
    return schema(**arguments)


def type_name(entry: Field[Any]) -> str:
    """A field's type as a user would say it."""
    text = entry.type if isinstance(entry.type, str) else getattr(entry.type, "__name__", str(entry.type))
    if entry.type in (int, float, bool, str):
        return {"int": "an integer", "float": "a number", "bool": "true or false", "str": "a string"}[text]
    plain = str(entry.type)
    for name, said in (
        ("list[int]", "a list of integers"),
        ("list[str]", "a list of strings"),
        ("list[float]", "a list of numbers"),
        ("int", "an integer"),
        ("float", "a number"),
        ("str", "a string"),
    ):
        if name in plain:
            return said + (" or null" if "None" in plain else "")
    return plain


def check_ranges(section: Any, prefix: str) -> None:
    """Checks each field of a dataclass against the bounds and choices in its metadata."""
    for entry in fields(section):
        value, limits = getattr(section, entry.name), entry.metadata
        if not limits or value is None:
            continue
        subject = f"{prefix}{entry.name}"
        if limits["choices"] and value not in limits["choices"]:
            near = did_you_mean(str(value), limits["choices"])
            raise UserError(subject, f"got {value!r}; expected one of {', '.join(limits['choices'])}.{near}")
        for name, said, holds in (
            ("minimum", "at least", lambda v, b: v >= b),
            ("above", "more than", lambda v, b: v > b),
            ("maximum", "at most", lambda v, b: v <= b),
            ("below", "less than", lambda v, b: v < b),
        ):
            bound = limits[name]
            if bound is None and name == "maximum" and isinstance(value, int) and limits["minimum"] is not None:
                bound = MOST
            if bound is not None and not holds(value, bound):
                raise UserError(subject, f"got {value!r}; expected {said} {bound}: {limits['meaning']}.")


def check_across(config: Any) -> None:
    """Combinations of keys that cannot work."""
    if not isinstance(config, PipelineConfig):
        return
    if isinstance(config.diffusion, EDMConfig) and config.diffusion.sigma_data != "auto":
        number_or_word(config.diffusion.sigma_data, "diffusion.sigma_data", ("auto",))
    bound = number_or_word(config.unlearning.null_loss, "unlearning.null_loss", NULL_LOSSES)
    if bound == "none" and config.unlearning.num_steps is None:
        raise UserError("unlearning.num_steps", "got null with null_loss=none, where no bound ends it. Set it.")
    training = config.training
    if training.patience is not None and training.validate_every is None:
        raise UserError(
            "training.patience", f"got {training.patience} without measurements. Set training.validate_every too."
        )
    if training.validate_every is not None and training.validate_every > training.num_steps:
        raise UserError(
            "training.validate_every",
            f"got {training.validate_every}; expected at most training.num_steps={training.num_steps}.",
        )
    if training.validate_every is not None and not config.data.holdout:
        raise UserError(
            "training.validate_every",
            f"got {training.validate_every} without held-out images. Set data.holdout to how many to keep for it.",
        )
    for name in ("sampler", "noise_bank"):
        section = getattr(config, name)
        if section.sigma_min >= section.sigma_max:
            raise UserError(
                f"{name}.sigma_min",
                f"got {section.sigma_min}; expected less than {name}.sigma_max={section.sigma_max}.",
            )
    if config.noise_bank.antithetic and not config.noise_bank.consistent:
        raise UserError(
            "noise_bank.antithetic", "got true with consistent=false, where no draw shares its noise. Leave one out."
        )
    if config.score.mode == "adaptive" and METHODS[config.method.name].can_race:
        check_race(config)
    check_trainable(config.unlearning, "unlearning")
    if hasattr(config.method, "trainable"):
        check_trainable(config.method, "method")
    size = config.score.batch_size
    if size is not None and size % 16:
        raise UserError("score.batch_size", f"got {size}; expected a multiple of 16.")
    if isinstance(config, RunCommandConfig):
        for stage in config.stages:
            if stage not in COMMANDS or stage in ("run", "show", "status"):
                raise UserError("stages", f"got {stage!r}; expected train, sample, unlearn, score, evaluate or report.")


RACING_REDUCERS = ("skew", "difference")
"""Those that are the mean over draws of a value of each draw."""


def check_race(config: PipelineConfig) -> None:
    """Refuses what ``score.mode=adaptive`` cannot race over."""
    reducer = getattr(config.method, "reducer", "skew")
    if reducer not in RACING_REDUCERS:
        raise UserError(
            "score.mode",
            f"got adaptive with method.reducer={reducer}, which is no mean over draws; expected "
            f"{' or '.join(RACING_REDUCERS)}. Use score.mode=exact.",
        )
    if not config.noise_bank.consistent:
        raise UserError(
            "score.mode",
            "got adaptive with noise_bank.consistent=false, where images share no draws. Use score.mode=exact.",
        )


def check_trainable(section: Any, name: str) -> None:
    """Refuses ``patterns`` or ``num_blocks`` that do not go with the ``trainable`` of the same section."""
    for key, preset, given in (
        ("patterns", "patterns", bool(section.patterns)),
        ("num_blocks", "last_blocks", section.num_blocks is not None),
    ):
        if (section.trainable == preset) != given:
            raise UserError(
                f"{name}.{key}",
                f"got {getattr(section, key)} with {name}.trainable={section.trainable}; expected {key} exactly when "
                f"trainable={preset}. Set both or neither.",
            )


def number_or_word(value: str, key: str, words: tuple[str, ...]) -> float | str:
    """A positive number, or one of ``words``; anything else is a UserError."""
    if value in words:
        return value
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if not 0 < number < float("inf"):
        raise UserError(key, f"got {value!r}; expected a positive number or one of {', '.join(words)}.")
    return number


def result_config(section: Any, scores_only: bool = True) -> dict[str, Any]:
    """The keys of a section that decide the numbers a stage writes.

    Args:
        scores_only: False to leave out what changes a method's scores and not its unlearned models.
    """
    return {
        f.name: getattr(section, f.name)
        for f in fields(section)
        if f.metadata.get("affects_result", True)
        and not is_section(f)
        and (scores_only or not f.metadata.get("scores_only", False))
    }
