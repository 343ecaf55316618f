"""Configuration schemas: every key with its type, default, meaning and range, and the checks across keys.

The dataclasses are Hydra structured configs (registered in ``composition.py``); help texts and validation come from the
same field metadata. Nothing here imports torch, so that help and completion answer at once.
"""

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields, is_dataclass
from typing import Any

from omegaconf import II, MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mucs_cli.errors import UserError, did_you_mean


def option(
    default: Any,
    meaning: str,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] | None = None,
    affects_result: bool = True,
) -> Any:
    """A dataclass field with its meaning, its range, and whether it changes the numbers a stage writes.

    Args:
        default: the default value; a list is copied for each instance.
        meaning: one line for the help, with the unit.
        minimum, above, maximum, below: bounds, inclusive (minimum, maximum) or exclusive (above, below).
        choices: allowed strings.
        affects_result: False for batch sizes, devices, logging: a stage is up to date whatever they are.
    """
    metadata = {
        "meaning": meaning,
        "minimum": minimum,
        "above": above,
        "maximum": maximum,
        "below": below,
        "choices": choices,
        "affects_result": affects_result,
    }
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


# --- sections --------------------------------------------------------------------------------------------------------


@dataclass
class DataConfig:
    name: str = option(MISSING, "kind of data set; set by data=")
    holdout: int = option(0, "images kept out of training, drawn by seed", minimum=0)
    limit: int | None = option(None, "use only the first images, for a quick try; null for all", minimum=1)
    seed: int = option(II("seed"), "seed of the held-out choice")


@dataclass
class DigitsConfig(DataConfig):
    name: str = option("digits", "kind of data set; set by data=")


@dataclass
class PictureConfig(DataConfig):
    """Keys of every data set whose images are encoded pictures (PNG, JPEG, WebP, BMP, TIFF, GIF)."""

    image_size: int | None = option(
        None, "side in pixels after centre crop and resizing; null: as they are, all of one size", minimum=2
    )
    color: str = option(
        "auto", "rgb, grayscale, or auto: grayscale if every picture is", choices=("auto", "rgb", "grayscale")
    )
    background: str = option("white", "what shows through transparent pixels: white, black or #rrggbb")
    max_pixels: int = option(
        178_956_970, "pixels of a picture as stored, above which it is not decoded", minimum=1, maximum=178_956_970
    )
    on_error: str = option(
        "stop", "a picture that cannot be read: stop, or skip (counted and listed)", choices=("stop", "skip")
    )
    verify: bool = option(False, "decode every picture again instead of trusting size and time", affects_result=False)


@dataclass
class ImageFolderConfig(PictureConfig):
    name: str = option("image_folder", "kind of data set; set by data=")
    path: str = option(MISSING, "folder of pictures, nested folders included; metadata.csv or .jsonl in it is read")
    labels: str = option(
        "none",
        "none; folder: the first folder below path is the class; metadata: a column of the metadata file is",
        choices=("none", "folder", "metadata"),
    )
    label_column: str = option("label", "labels=metadata: the column that holds the class")
    num_classes: int | None = option(
        None, "labels that are whole numbers: how many classes there are; null: as found", minimum=1
    )
    condition_file: str | None = option(
        None, "safetensors file, tensor condition, float32 [N, d] or [N, k, d]; in path, or relative to where you are"
    )


@dataclass
class HuggingFaceConfig(PictureConfig):
    name: str = option("huggingface", "kind of data set; set by data=")
    path: str = option(
        MISSING, "save_to_disk folder, parquet or arrow file or folder of them, imagefolder, or a name on the hub"
    )
    subset: str | None = option(None, "configuration of a data set on the hub; null: its default")
    revision: str | None = option(None, "commit, tag or branch of a data set on the hub; null: the newest")
    split: str = option("train", "which split")
    image_column: str | None = option(None, "column of the images; null: the only one there is")
    label_column: str | None = option(None, "column of the classes; null: the only ClassLabel column, if there is one")
    num_classes: int | None = option(
        None, "labels that are whole numbers: how many classes there are; null: as found", minimum=1
    )
    metadata_columns: list[str] | None = option(
        None, "columns shown in scores and report; null: all of text, numbers and lists of them"
    )
    caption_column: str | None = option(
        None, "column of the caption or captions that text_encoder embeds as the image's condition"
    )
    text_encoder: str | None = option(
        None, "CLIP text model, a local folder or a name on the hub; null: captions are metadata only"
    )
    captions_per_image: int = option(5, "captions embedded an image; one with fewer repeats its own", minimum=1)


@dataclass
class ModelConfig:
    name: str = option(MISSING, "kind of network; set by model=")


@dataclass
class PretrainedConfig(ModelConfig):
    name: str = option("pretrained", "kind of network; set by model=")
    path: str = option(MISSING, "folder of a diffusers pipeline or network, or of a finished run", affects_result=False)


@dataclass
class NetworkConfig(ModelConfig):
    size: str = option("paper", "tiny, small or paper; the keys below override it", choices=("tiny", "small", "paper"))
    conditional: bool = option(False, "condition the network on the data's labels, or its condition vectors")
    dropout: float = option(0.1, "dropout probability in training", minimum=0, below=1)


@dataclass
class DiTConfig(NetworkConfig):
    name: str = option("dit", "kind of network; set by model=")
    patch_size: int = option(2, "side of a token's square, pixels", minimum=1)
    width: int | None = option(None, "channels of a token; null: by size (64, 384, 768)", minimum=4)
    num_layers: int | None = option(None, "transformer blocks; null: by size (3, 12, 12)", minimum=1)
    num_heads: int | None = option(None, "attention heads; null: by size (4, 6, 12)", minimum=1)
    mlp_ratio: float = option(4.0, "hidden width of the MLP over width", above=0)


@dataclass
class UNetConfig(NetworkConfig):
    name: str = option("unet", "kind of network; set by model=")
    channels: int | None = option(None, "base channels; null: by size (16, 64, 128)", minimum=4)
    multipliers: list[int] | None = option(None, "channel multiplier a level; null: by size ([1,2], [2,2], [2,2,2])")
    layers_per_block: int | None = option(None, "residual blocks a level; null: by size (1, 2, 4)", minimum=1)
    attention_resolutions: list[int] | None = option(
        None, "sides, in pixels, of levels with self-attention; null: by size ([4], [16], [16])"
    )


@dataclass
class DiffusionConfig:
    name: str = option(MISSING, "preconditioning; set by diffusion=")


@dataclass
class EDMConfig(DiffusionConfig):
    name: str = option("edm", "preconditioning; set by diffusion=")
    sigma_data: str = option("0.5", "standard deviation of the pixels, or auto: measured on the training images")
    p_mean: float = option(-1.2, "mean of ln sigma in training; shifted by ln(sigma_data/0.5) when sigma_data=auto")
    p_std: float = option(1.2, "standard deviation of ln sigma in training", above=0)


@dataclass
class VPConfig(DiffusionConfig):
    name: str = option("vp", "preconditioning; set by diffusion=")
    beta_d: float = option(19.9, "slope of the noise schedule", above=0)
    beta_min: float = option(0.1, "start of the noise schedule", above=0)


@dataclass
class DDPMConfig(DiffusionConfig):
    name: str = option("ddpm", "preconditioning; set by diffusion=")
    num_train_timesteps: int = option(1000, "noise levels", minimum=2)
    beta_schedule: str = option(
        "linear",
        "noise schedule, as diffusers names it",
        choices=("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"),
    )
    beta_start: float = option(1e-4, "first beta, of schedules that have a choice", above=0, below=1)
    beta_end: float = option(0.02, "last beta, of schedules that have a choice", above=0, below=1)
    prediction_type: str = option("epsilon", "what the network predicts", choices=("epsilon", "v_prediction", "sample"))
    rescale_betas_zero_snr: bool = option(False, "rescale the schedule so that its last level is pure noise")


@dataclass
class TrainingConfig:
    num_steps: int = option(200_000, "updates", minimum=1)
    batch_size: int = option(128, "images an update", minimum=1)
    micro_batch_size: int | None = option(
        None, "images a forward pass; null: the whole batch", minimum=1, affects_result=False
    )
    learning_rate: float = option(1e-4, "peak learning rate of AdamW", above=0)
    weight_decay: float = option(0.01, "AdamW weight decay", minimum=0)
    warmup_steps: int = option(0, "updates of linear warm-up", minimum=0)
    decay: str = option("constant", "learning rate after the warm-up", choices=("constant", "cosine", "linear"))
    ema_decay: float = option(
        0.999, "decay an update of the weights' moving average, which is what is used", minimum=0, below=1
    )
    condition_dropout: float = option(
        0.1, "probability of training an image without its condition", minimum=0, maximum=1
    )
    horizontal_flip: bool = option(False, "mirror images at random")
    augmentation: float = option(0.0, "probability of each EDM augmentation (non-leaking)", minimum=0, maximum=1)
    checkpoint_every_seconds: float = option(60.0, "time between resumable checkpoints", above=0, affects_result=False)
    seed: int = option(II("seed"), "seed of initialisation, order, noise and dropout")


@dataclass
class SamplerConfig:
    num_steps: int = option(32, "noise levels of the Heun sampler (2 num_steps - 1 evaluations)", minimum=1)
    sigma_min: float = option(0.002, "lowest noise level", above=0)
    sigma_max: float = option(80.0, "highest noise level", above=0)
    rho: float = option(7.0, "exponent of the noise grid", above=0)
    guidance: float = option(1.0, "classifier-free guidance weight; 1 for none", minimum=0)
    batch_size: int = option(256, "images sampled at once", minimum=1, affects_result=False)


@dataclass
class QueriesConfig:
    name: str = option(MISSING, "where the images to explain come from; set by queries=")
    index: Any = option(
        None, "which queries to unlearn and score: 3, [0,4] or a slice such as 0:10; null: all", affects_result=False
    )


@dataclass
class SampledQueriesConfig(QueriesConfig):
    name: str = option("sampled", "where the images to explain come from; set by queries=")
    num: int = option(10, "generated images to explain", minimum=1)
    seed: int = option(II("seed"), "seed of the first query; query i has a stream of its own")
    classes: list[int] | None = option(None, "classes to sample in turn, for a conditional model; null: all")


@dataclass
class FolderQueriesConfig(QueriesConfig):
    name: str = option("folder", "where the images to explain come from; set by queries=")
    path: str = option(
        MISSING, "folder of generated pictures; column label of its metadata, or a folder a class", affects_result=False
    )
    condition_file: str | None = option(
        None, "safetensors file as data.condition_file, with the queries' vectors", affects_result=False
    )


@dataclass
class NoiseBankConfig:
    num_draws: int = option(100, "draws (sigma, noise) an image", minimum=1)
    grid: str = option(
        "truncated",
        "truncated: the release's first n of floor(n/0.7) levels; exact: linspace(0, 0.7, n); full: linspace(0, 1, n)",
        choices=("truncated", "exact", "full"),
    )
    sigma_min: float = option(0.002, "lowest level of the untruncated grid", above=0)
    sigma_max: float = option(80.0, "highest level", above=0)
    rho: float = option(7.0, "exponent of the grid", above=0)
    seed: int = option(II("seed"), "seed of the noise")


@dataclass
class UnlearningConfig:
    forget_weight: float = option(0.2, "lambda, weight of the forget loss", minimum=0)
    learning_rate: float | None = option(None, "AdamW learning rate; null: a tenth of the training's", above=0)
    weight_decay: float = option(0.01, "AdamW weight decay", minimum=0)
    retain_batch_size: int = option(100, "training images an update", minimum=1)
    forget_batch_size: int = option(100, "noisy copies of the query an update", minimum=1)
    micro_batch_size: int | None = option(
        None, "images a forward pass; null: the whole batch", minimum=1, affects_result=False
    )
    null_loss: str = option(
        "auto", "the bound: closed_form, monte_carlo, a number, or auto (closed form where it holds)"
    )
    tolerance: float = option(
        0.95, "stop when the clamped forget loss reaches this share of the bound", above=0, maximum=1
    )
    max_steps: int = option(1000, "cap on updates; reaching it is reported", minimum=1)
    num_steps: int | None = option(
        None, "exactly this many updates, without the stop rule; null: stop by the rule", minimum=0
    )
    trainable: str = option(
        "auto", "auto: mlp for a DiT, all_but_bias for a U-Net; or mlp, all_but_bias, attention, all, patterns"
    )
    patterns: list[str] = option([], "trainable=patterns: shell patterns of parameter names")
    seed: int = option(II("seed"), "seed of each query's batches and noise")


@dataclass
class MethodConfig:
    name: str = option("mucs", "attribution method", choices=("mucs",))
    epsilon: float = option(1e-3, "added to the denominator of the skew", minimum=0)


@dataclass
class ScoreConfig:
    batch_size: int | None = option(
        None,
        "training images a forward pass, a multiple of 16; null: measured once and stored in the run",
        minimum=16,
        affects_result=False,
    )
    memory_budget: float = option(
        4.0, "GiB for unlearned weights that share a pass over the data", above=0, affects_result=False
    )
    group_by: list[str] | None = option(
        None,
        "metadata columns summed up in groups.csv, for example [artist,licence]; [] for none; null: those that have 2 "
        "to 50 values and at most half as many as images",
        affects_result=False,
    )
    group_k: int | None = option(
        None,
        "highest scores of a query of which each group's share is given; null: 1 % of the images, at least 10",
        minimum=1,
        affects_result=False,
    )


@dataclass
class ReportConfig:
    k: int = option(10, "top training images shown for each query", minimum=1)
    exclude_exact: bool = option(False, "leave exact copies of the query out of the ranking")
    group_by: list[str] | None = option(
        None,
        "metadata columns summed up, for example [artist,licence]; [] for none; null: those that have 2 to 50 values "
        "and at most half as many as images",
    )
    group_k: int | None = option(
        None,
        "highest scores of a query of which each group's share is shown; null: 1 % of the images, at least 10",
        minimum=1,
    )


# --- commands --------------------------------------------------------------------------------------------------------


@dataclass
class RootConfig:
    run: str = option(MISSING, "the run's folder, for example outputs/digits", affects_result=False)


@dataclass
class PipelineConfig(RootConfig):
    seed: int = option(0, "seed of everything that has no seed of its own")
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda"), affects_result=False)
    overwrite: bool = option(False, "redo a stage whose folder holds another result", affects_result=False)
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
    report: ReportConfig = field(default_factory=ReportConfig)


@dataclass
class RunCommandConfig(PipelineConfig):
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
    "train": Command("train the base model", PipelineConfig, TRAIN_SECTIONS, TRAIN_SECTIONS),
    "sample": Command(
        "generate the queries, or read them", PipelineConfig, ("sampler", "queries"), ("sampler", "queries")
    ),
    "unlearn": Command("one unlearned model a query", PipelineConfig, ("method", "unlearning")),
    "score": Command(
        "score every training image for every query",
        PipelineConfig,
        ("method", "unlearning", "noise_bank", "score"),
    ),
    "report": Command("write the HTML report", PipelineConfig, ("report",)),
    "show": Command("print a query's top training images", ShowConfig),
    "run": Command(
        "run the stages in order, skipping what is up to date",
        RunCommandConfig,
        (*TRAIN_SECTIONS, "sampler", "queries", "method", "unlearning", "noise_bank", "score", "report"),
    ),
    "status": Command("what a run holds, its sizes, and what can be cleaned", StatusConfig),
}

VARIANT_SECTIONS = ("method", "unlearning", "noise_bank")
"""Sections whose values, where they differ from the run's own, name a variant."""

SECTION_SCHEMAS: dict[str, dict[str, type]] = {
    "data": {"digits": DigitsConfig, "image_folder": ImageFolderConfig, "huggingface": HuggingFaceConfig},
    "model": {"dit": DiTConfig, "unet": UNetConfig, "pretrained": PretrainedConfig},
    "diffusion": {"edm": EDMConfig, "vp": VPConfig, "ddpm": DDPMConfig},
    "queries": {"sampled": SampledQueriesConfig, "folder": FolderQueriesConfig},
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
            if bound is not None and not holds(value, bound):
                raise UserError(subject, f"got {value!r}; expected {said} {bound}: {limits['meaning']}.")


def check_across(config: Any) -> None:
    """Combinations of keys that cannot work."""
    if not isinstance(config, PipelineConfig):
        return
    if isinstance(config.diffusion, EDMConfig) and config.diffusion.sigma_data != "auto":
        number_or_word(config.diffusion.sigma_data, "diffusion.sigma_data", ("auto",))
    number_or_word(config.unlearning.null_loss, "unlearning.null_loss", ("auto", "closed_form", "monte_carlo"))
    for name in ("sampler", "noise_bank"):
        section = getattr(config, name)
        if section.sigma_min >= section.sigma_max:
            raise UserError(
                f"{name}.sigma_min",
                f"got {section.sigma_min}; expected less than {name}.sigma_max={section.sigma_max}.",
            )
    trainable = ("auto", "mlp", "all_but_bias", "attention", "all", "patterns")
    if config.unlearning.trainable not in trainable:
        raise UserError(
            "unlearning.trainable", f"got {config.unlearning.trainable!r}; expected one of {', '.join(trainable)}."
        )
    if (config.unlearning.trainable == "patterns") != bool(config.unlearning.patterns):
        raise UserError(
            "unlearning.patterns",
            f"got {config.unlearning.patterns} with unlearning.trainable={config.unlearning.trainable}; "
            "expected patterns exactly when trainable=patterns.",
        )
    size = config.score.batch_size
    if size is not None and size % 16:
        raise UserError("score.batch_size", f"got {size}; expected a multiple of 16.")
    if isinstance(config, RunCommandConfig):
        for stage in config.stages:
            if stage not in COMMANDS or stage in ("run", "show", "status"):
                raise UserError("stages", f"got {stage!r}; expected train, sample, unlearn, score or report.")


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


def result_config(section: Any) -> dict[str, Any]:
    """The keys of a section that decide the numbers a stage writes."""
    return {
        f.name: getattr(section, f.name)
        for f in fields(section)
        if f.metadata.get("affects_result", True) and not is_section(f)
    }
