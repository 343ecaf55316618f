"""The sections of the configuration: every key with its type, default, meaning and range.

The dataclasses are Hydra structured configs (registered in ``composition.py``); help texts and validation come from the
same field metadata. An attribution method's own section is in its file below ``methods/``. Nothing here imports torch,
so that help and completion answer at once.
"""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import II, MISSING

MILLION = 1_000_000
"""Bound of numbers that are held in memory, or drawn, before anything else happens."""
MOST = 1_000_000_000
"""Bound of all other whole numbers that count something."""
MOST_THREADS = 1024
"""More crash the process on common machines."""


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
    scores_only: bool = False,
) -> Any:
    """A dataclass field with its meaning, its range, and whether it changes the numbers a stage writes.

    Args:
        default: the default value; a list is copied for each instance.
        meaning: one line for the help, with the unit.
        minimum, above, maximum, below: bounds, inclusive (minimum, maximum) or exclusive (above, below).
        choices: allowed strings.
        affects_result: False for batch sizes, devices, logging: a stage is up to date whatever they are.
        scores_only: of a method that unlearns: True for a key that changes its scores, not its unlearned models.
    """
    metadata = {
        "meaning": meaning,
        "minimum": minimum,
        "above": above,
        "maximum": maximum,
        "below": below,
        "choices": choices,
        "affects_result": affects_result,
        "scores_only": scores_only,
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
    batch_size: int = option(128, "images an update", minimum=1, maximum=MILLION)
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
    validate_every: int | None = option(
        None,
        "updates between measurements of the loss on the held-out images (data.holdout), whose best weights are used; "
        "null: none, the last weights are",
        minimum=1,
    )
    patience: int | None = option(
        None, "measurements without a lower loss after which training stops; null: never", minimum=1
    )
    seed: int = option(II("seed"), "seed of initialisation, order, noise and dropout")


@dataclass
class SamplerConfig:
    num_steps: int = option(32, "noise levels of the Heun sampler (2 num_steps - 1 evaluations)", minimum=1)
    sigma_min: float = option(0.002, "lowest noise level", above=0)
    sigma_max: float = option(80.0, "highest noise level", above=0)
    rho: float = option(7.0, "exponent of the noise grid", above=0)
    guidance: float = option(1.0, "classifier-free guidance weight; 1 for none", minimum=0)
    batch_size: int = option(256, "images sampled at once", minimum=1, maximum=MILLION, affects_result=False)


@dataclass
class QueriesConfig:
    name: str = option(MISSING, "where the images to explain come from; set by queries=")
    index: Any = option(
        None, "which queries to unlearn and score: 3, [0,4] or a slice such as 0:10; null: all", affects_result=False
    )


@dataclass
class SampledQueriesConfig(QueriesConfig):
    name: str = option("sampled", "where the images to explain come from; set by queries=")
    num: int = option(10, "generated images to explain", minimum=1, maximum=MILLION)
    held_out: int = option(
        0,
        "held-out images (data.holdout) to explain as well, after the generated ones; drawn by seed",
        minimum=0,
        maximum=MILLION,
    )
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
    num_draws: int = option(100, "draws (sigma, noise) an image", minimum=1, maximum=MILLION)
    grid: str = option(
        "truncated",
        "truncated: the release's first n of floor(n/0.7) levels; exact: linspace(0, 0.7, n); full: linspace(0, 1, n); "
        "even: evenly through the levels of training",
        choices=("truncated", "exact", "full", "even"),
    )
    sigma_min: float = option(0.002, "lowest level of the untruncated grid", above=0)
    sigma_max: float = option(80.0, "highest level", above=0)
    rho: float = option(7.0, "exponent of the grid", above=0)
    consistent: bool = option(
        True, "the same noise for every image and model; false: noise of its own for each, at the same levels"
    )
    antithetic: bool = option(
        False,
        "neighbouring levels of the grid in pairs that share their noise, with opposite signs; less noise in scores",
    )
    seed: int = option(II("seed"), "seed of the noise")


@dataclass
class UnlearningConfig:
    forget_weight: float = option(0.2, "lambda, weight of the forget loss", minimum=0)
    learning_rate: float | None = option(None, "learning rate; null: a tenth of the training's", above=0)
    optimizer: str = option("adamw", "adamw, adam or sgd", choices=("adamw", "adam", "sgd"))
    weight_decay: float = option(0.01, "weight decay", minimum=0)
    retain_batch_size: int = option(100, "training images an update", minimum=1, maximum=MILLION)
    forget_batch_size: int = option(100, "noisy copies of the query an update", minimum=1, maximum=MILLION)
    micro_batch_size: int | None = option(
        None, "images a forward pass; null: the whole batch", minimum=1, affects_result=False
    )
    stack_size: int | None = option(
        1,
        "queries unlearned at once, which pays for small networks with small batches; null: measured once and stored "
        "in the run",
        minimum=1,
        affects_result=False,
    )
    null_loss: str = option(
        "auto", "the bound: closed_form, monte_carlo, a number, auto (closed form where it holds), or none (no bound)"
    )
    tolerance: float = option(
        0.95, "stop when the clamped forget loss reaches this share of the bound", above=0, maximum=1
    )
    max_steps: int = option(1000, "cap on updates; reaching it is reported", minimum=1)
    num_steps: int | None = option(
        None, "exactly this many updates, without the stop rule; null: stop by the rule", minimum=0
    )
    trainable: str = option(
        "auto",
        "auto: mlp for a DiT, all_but_bias for a U-Net; or mlp, all_but_bias, attention, all, last_blocks, patterns",
        choices=("auto", "mlp", "all_but_bias", "attention", "all", "last_blocks", "patterns"),
    )
    num_blocks: int | None = option(
        None, "trainable=last_blocks: how many transformer blocks, or up blocks of a U-Net", minimum=1
    )
    patterns: list[str] = option([], "trainable=patterns: shell patterns of parameter names")
    schedule: str = option(
        "training",
        "noise levels of the steps: training (as in training) or grid (the noise bank's levels, at random)",
        choices=("training", "grid"),
    )
    same_noise: bool = option(False, "training images and copies of the query share levels and noise")
    horizontal_flip: bool = option(False, "mirror training images and copies of the query at random")
    augmentation: float = option(
        0.0, "probability of each EDM augmentation of training images and copies", minimum=0, maximum=1
    )
    similarity_weight: float = option(
        0.0, "weigh training images by exp(this x cosine of their pixels and the query's); 0: all the same"
    )
    seed: int = option(II("seed"), "seed of each query's batches and noise")


@dataclass
class MethodConfig:
    name: str = option(MISSING, "attribution method; set by method=")


@dataclass
class ScoreConfig:
    mode: str = option(
        II("score_mode:${speed}"),
        "exact: every image under every draw; adaptive: a few draws for all, the whole bank for those that can still "
        "be among the highest (mucs and forward_inf)",
        choices=("exact", "adaptive"),
    )
    top_k: int | None = option(
        None,
        "mode=adaptive: how many highest scores are settled; null: two times 1 % of the images, at least 50",
        minimum=1,
    )
    confidence: float = option(
        0.99, "mode=adaptive: that a dropped image is not among the highest; lower drops sooner", minimum=0.5, below=1
    )
    precision: str = option(
        "float32",
        "of the network's matrix products in scoring by losses: float32, tf32 (CUDA only) or bfloat16; weights "
        "and losses stay float32",
        choices=("float32", "tf32", "bfloat16"),
    )
    batch_size: int | None = option(
        None,
        "training images a forward pass, a multiple of 16; null: measured once and stored in the run",
        minimum=16,
        affects_result=False,
    )
    keep_losses: bool = option(
        False,
        "keep every unlearned model's losses, so that variants that differ in scoring only need no forward pass",
        affects_result=False,
    )
    memory_budget: float = option(
        4.0,
        "GiB for what shares a pass over the data: unlearned weights, or gradients of training images",
        above=0,
        affects_result=False,
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
class CheckpointConfig:
    every_seconds: float = option(
        60.0,
        "seconds between saved states of training, retraining and unlearning; what a kill -9 loses at most, with "
        "one step",
        above=0,
        affects_result=False,
    )


@dataclass
class EvaluationConfig:
    name: str = option(MISSING, "evaluation; set by evaluation=")
    variants: list[str] | None = option(
        None, "finished variants, folder names below score/, for example [mucs,pixel]; null: all"
    )


@dataclass
class RetrainingEvaluationConfig(EvaluationConfig):
    """Keys of every evaluation that trains models anew."""

    worker: int | None = option(
        None,
        "any number: only train, sharing the models with other workers, for example evaluation.worker=0,1,2,3 with -m; "
        "null: train what is missing, then evaluate",
        affects_result=False,
    )


@dataclass
class MetricsConfig(EvaluationConfig):
    """Keys of every evaluation that compares pictures; the weights decide its results, wherever they lie."""

    metrics: list[str] = option(
        ["ssim", "mae", "cosine"], "similarities of pictures: ssim, mae, cosine, lpips, clip, dino, sscd"
    )
    lpips_path: str | None = option(None, "lpips: the file that scripts/convert/lpips.py wrote", affects_result=False)
    clip_path: str | None = option(
        None, "clip: folder of a CLIP model in safetensors, or its name on the hub", affects_result=False
    )
    dino_path: str | None = option(
        None, "dino: folder of a DINO or DINOv2 model in safetensors, or its name on the hub", affects_result=False
    )
    sscd_path: str | None = option(None, "sscd: the file that scripts/convert/sscd.py wrote", affects_result=False)


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
    images: bool = option(True, "pictures; false: file names and scores only, for data that must not travel")
