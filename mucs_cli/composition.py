"""Where the configuration files are, which choices they offer, and how they are composed with their schemas.

Hydra is imported inside the functions that need it, so that help answers at once.
"""

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from mucs_cli import config

if TYPE_CHECKING:
    from omegaconf import DictConfig


def conf_folder() -> Path:
    """The folder of the configuration files: the installed package ``mucs_cli.conf``, or the checkout's ``conf``."""
    spec = find_spec("mucs_cli.conf")
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(__file__).parent.parent / "conf"


def group_options(folders: Iterable[Path] = ()) -> dict[str, list[str]]:
    """Config group -> its options, sorted; from the package and the user's own configuration folders."""
    options: dict[str, set[str]] = {}
    for folder in (conf_folder(), *folders):
        for group in folder.iterdir() if folder.is_dir() else ():
            if group.is_dir() and group.name != "hydra":
                names = {path.relative_to(group).with_suffix("").as_posix() for path in group.rglob("*.yaml")}
                options.setdefault(group.name, set()).update(names)
    return {group: sorted(names) for group, names in sorted(options.items()) if names}


def register_schemas() -> None:
    """Makes the dataclasses known to Hydra, at the root of its store: below a group they would show up as choices."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(name="schema_pipeline", node=config.PipelineConfig)
    store.store(name="schema_planned", node=config.PlannedCommandConfig)
    store.store(name="schema_run", node=config.RunCommandConfig)
    store.store(name="schema_show", node=config.ShowConfig)
    store.store(name="schema_status", node=config.StatusConfig)
    for section, by_name in config.SECTION_SCHEMAS.items():
        for name, schema in by_name.items():
            store.store(name=f"schema_{section}_{name}", node=schema)
    for section in config.sections_of(config.PipelineConfig):
        if section not in config.SECTION_SCHEMAS:
            store.store(name=f"schema_{section}", node=config.schema_of(section, {}, config.PipelineConfig))


def compose(command: str, overrides: list[str]) -> "DictConfig":
    """The configuration of a command, as its command line would compose it.

    Inside a Hydra application (and so with the user's own configuration folder) that application's search path is used.
    """
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    if GlobalHydra.instance().is_initialized():
        name = HydraConfig.get().job.config_name if HydraConfig.initialized() else command
        return hydra.compose(name, overrides)
    register_schemas()
    with hydra.initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return hydra.compose(command, overrides)
