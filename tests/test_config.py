"""The schemas and the configuration files agree, every composition is valid, and every wrong value is named."""

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from mucs_cli.composition import compose, conf_folder, group_options
from mucs_cli.config import (
    COMMANDS,
    SECTION_SCHEMAS,
    PipelineConfig,
    RunCommandConfig,
    known_keys,
    result_config,
    schema_of,
    sections_of,
    validate,
)
from mucs_cli.errors import UserError

PIPELINE = [name for name, command in COMMANDS.items() if issubclass(command.schema, PipelineConfig)]
CHOICES = [(group, option) for group, options in group_options().items() for option in options]
KINDS = [(g, o) for g, o in CHOICES if g != "experiment" and o in SECTION_SCHEMAS.get(g, [o])]
"""Choices that stand for a schema; the others (cifar10) are one of these with values of their own."""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_composes_into_a_valid_configuration(command: str) -> None:
    config = validate(compose(command, ["run=somewhere"]), COMMANDS[command].schema)
    assert type(config) is COMMANDS[command].schema
    assert config.run == "somewhere"


@pytest.mark.parametrize(
    ("command", "group", "option"),
    [(command, *choice) for choice in CHOICES for command in (PIPELINE if choice[0] == "experiment" else ["run"])],
)
def test_every_choice_composes(command: str, group: str, option: str) -> None:
    """Groups for ``run``, which has all sections, and experiments, which choose several, for every command."""
    cfg = compose(command, ["run=somewhere", f"{group}={option}"])
    required = [
        f"{section}.path=somewhere"
        for section in ("data", "model", "queries", "method")
        if OmegaConf.is_missing(cfg[section], "path")
    ]
    if required:
        cfg = compose(command, ["run=somewhere", f"{group}={option}", *required])
    config = validate(cfg, COMMANDS[command].schema)
    if (group, option) in KINDS and group in SECTION_SCHEMAS:
        assert type(getattr(config, group)) is SECTION_SCHEMAS[group][option]


def default_of(entry: Any) -> Any:
    return entry.default_factory() if entry.default_factory is not MISSING else entry.default


@pytest.mark.parametrize(("group", "option"), KINDS)
def test_files_state_every_key_of_their_schema_with_its_default(group: str, option: str) -> None:
    # help prints the schema's defaults; a file that said something else would make it lie
    written = OmegaConf.to_container(OmegaConf.load(conf_folder() / group / f"{option}.yaml"))
    assert isinstance(written, dict)
    written.pop("defaults")
    schema = schema_of(group, {"name": option}, PipelineConfig)
    assert written == {entry.name: default_of(entry) for entry in fields(schema)}


@pytest.mark.parametrize(("file", "schema"), [("pipeline", PipelineConfig), ("show", None), ("status", None)])
def test_primary_files_state_the_schemas_defaults(file: str, schema: type | None) -> None:
    schema = schema or COMMANDS[file].schema
    written = OmegaConf.to_container(OmegaConf.load(conf_folder() / f"{file}.yaml"))
    assert isinstance(written, dict)
    for entry in fields(schema):
        if entry.name in sections_of(schema):
            expected = (
                {e.name: default_of(e) for e in fields(schema_of(entry.name, {"name": "dit"}, schema))}
                if entry.name in ("score", "report", "checkpoint")
                else None
            )
        else:
            expected = default_of(entry)
        assert written.get(entry.name) == expected, entry.name


def test_no_configuration_file_names_code() -> None:
    files = list(conf_folder().rglob("*.yaml"))
    assert len(files) >= 20
    assert not [path for path in files if "_target_" in path.read_text()]


def test_every_key_has_a_meaning() -> None:
    for command in COMMANDS.values():
        for key, entry in known_keys(command.schema).items():
            assert entry.metadata["meaning"], key


def test_every_later_default_derives_from_the_one_seed() -> None:
    config = validate(compose("run", ["run=x", "seed=7"]), RunCommandConfig)
    seeds = {
        name: getattr(config, name).seed
        for name in sections_of(RunCommandConfig)
        if hasattr(getattr(config, name), "seed")
    }
    assert set(seeds) == {"data", "training", "queries", "noise_bank", "unlearning", "evaluation"}
    assert set(seeds.values()) == {7}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["unlearning.forget_weight=-1"], "unlearning.forget_weight: got -1.0; expected at least 0"),
        (["queries.num=0"], "queries.num: got 0; expected at least 1"),
        (
            ["training.decay=cosin"],
            "training.decay: got 'cosin'; expected one of constant, cosine, linear. Did you mean 'cosine'?",
        ),
        (["noise_bank.num_draws=1000000000000"], "noise_bank.num_draws: got 1000000000000; expected at most 1000000:"),
        (["training.num_steps=10000000000"], "training.num_steps: got 10000000000; expected at most 1000000000:"),
        (["threads=30000"], "threads: got 30000; expected at most 1024:"),
        (["training.ema_decay=1"], "training.ema_decay: got 1.0; expected less than 1"),
        (["noise_bank.sigma_min=90"], "noise_bank.sigma_min: got 90.0; expected less than noise_bank.sigma_max=80.0."),
        (
            ["noise_bank.antithetic=true", "noise_bank.consistent=false"],
            "noise_bank.antithetic: got true with consistent=false",
        ),
        (["score.batch_size=20"], "score.batch_size: got 20; expected a multiple of 16."),
        (["diffusion.sigma_data=wide"], "diffusion.sigma_data: got 'wide'; expected a positive number or one of auto."),
        (["unlearning.trainable=patterns"], "unlearning.patterns: got [] with unlearning.trainable=patterns"),
        (
            ["method=dtrak", "method.patterns=[x]"],
            "method.patterns: got ['x'] with method.trainable=all; expected patt",
        ),
        (
            ["method=abu", "method.num_blocks=1"],
            "method.num_blocks: got 1 with method.trainable=key_value; expected num",
        ),
        (["unlearning.trainable=last_blocks"], "unlearning.num_blocks: got None with unlearning.trainable=last_blocks"),
        (["data=image_folder"], "data.path: is not set; expected folder of"),
        (["stages=[train,fly]"], "stages: got 'fly'; expected train, sample, unlearn, score, evaluate or report."),
        (["training.num_steps=${nope}"], "training.num_steps: cannot be resolved: Interpolation key 'nope' not found."),
        (["+extra=1"], "extra: no such key."),
        (["+training.num_step=1"], "training.num_step: no such key. Did you mean 'num_steps'?"),
        (["run=???"], "run: is not set; expected the run's folder"),
    ],
)
def test_a_value_that_cannot_be_is_named_with_what_is_expected(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(compose("run", ["run=x", *overrides]), RunCommandConfig)
    assert str(caught.value).startswith(message)


def test_result_config_leaves_out_what_cannot_change_a_number() -> None:
    config = validate(compose("run", ["run=x"]), RunCommandConfig)
    assert "micro_batch_size" not in result_config(config.training)
    assert result_config(config.training)["num_steps"] == 200_000
    assert set(result_config(config.score)) == {"mode", "top_k", "confidence", "precision"}


def test_the_conf_folder_is_a_package_with_all_its_files() -> None:
    assert (conf_folder() / "__init__.py").is_file()
    assert Path(conf_folder(), "experiment", "digits.yaml").is_file()
