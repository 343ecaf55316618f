"""The help texts, from the schemas and the configuration folder alone: without Hydra and torch they come at once."""

import textwrap
from dataclasses import MISSING, Field, fields
from typing import Any

from omegaconf import OmegaConf

from mucs_cli import __version__
from mucs_cli.composition import group_options
from mucs_cli.config import COMMANDS, SECTION_SCHEMAS, PipelineConfig, is_section, type_name

WIDTH = 100

EXAMPLES = {
    "train": ["mucs train experiment=digits", "mucs train run=outputs/mine data=image_folder data.path=my/images"],
    "sample": ["mucs sample run=outputs/digits", "mucs sample run=outputs/digits queries.num=20 overwrite=true"],
    "unlearn": [
        "mucs unlearn run=outputs/digits",
        "mucs unlearn -m run=outputs/digits unlearning.forget_weight=0.1,0.2,0.5",
    ],
    "score": [
        "mucs score run=outputs/digits",
        "mucs score -m run=outputs/digits unlearning.forget_weight=0.1,0.2,0.5",
    ],
    "evaluate": [
        "mucs evaluate run=outputs/digits",
        "mucs evaluate run=outputs/digits evaluation.variants=[mucs,pixel] evaluation.k=20",
        "mucs evaluate run=outputs/digits evaluation=retrieval evaluation.relevant=class",
    ],
    "report": ["mucs report run=outputs/digits", "mucs report run=outputs/digits report.k=20"],
    "show": ["mucs show run=outputs/digits query=3 k=5", "mucs show run=outputs/digits query=3 --bottom"],
    "run": [
        "mucs run experiment=digits",
        "mucs run experiment=digits plan=true",
        "mucs run experiment=digits run=outputs/quick data.limit=200",
    ],
    "status": ["mucs status run=outputs/digits", "mucs status run=outputs/digits clean=true"],
}

FLAGS = """\
  -m, --multirun      one job a combination of comma-separated values (a sweep)
  --cfg job           print the composed configuration and exit
  --info              print Hydra's facts: defaults list, search path, plugins
  -cd FOLDER          also look for configuration files (experiment/mine.yaml) in FOLDER
  -cn NAME            another primary configuration file
  --hydra-help        Hydra's own options
"""


def main_help() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    return f"""\
mucs {__version__}: which training images caused a generated image? Training data attribution for diffusion models.

Usage: mucs COMMAND [group=option] [key=value] [flags]

Commands
{commands}

Start with
  mucs run experiment=digits        train, sample, unlearn, score and report on handwritten digits, minutes on a CPU
  mucs show run=outputs/digits      its results in the terminal

  mucs COMMAND --help               a command's keys, with meaning and range
  mucs --version
  eval "$(mucs -sc install=bash)"   completion of commands, keys and choices in bash
"""


def command_help(name: str) -> str:
    """Usage, groups, keys with default, meaning and range, flags and examples of one command."""
    command = COMMANDS[name]
    blocks = [f"mucs {name}: {command.summary}.\n\nUsage: mucs {name} [group=option] [key=value] [flags]\n"]
    options = {
        group: choices
        for group, choices in group_options().items()
        if group in command.sections or (group == "experiment" and issubclass(command.schema, PipelineConfig))
    }
    if options:
        lines = [f"  {group + '=':<18}{' | '.join(choices)}" for group, choices in options.items()]
        blocks.append("Groups\n" + "\n".join(lines) + "\n")
    blocks.append("Keys\n" + "".join(keys_texts("", command.schema).values()))
    for section in command.sections:
        kinds = SECTION_SCHEMAS.get(section)
        if kinds is None:
            texts = keys_texts(f"{section}.", section_schema(command.schema, section))
            blocks.append(f"{section}\n" + "".join(texts.values()))
            continue
        shown: dict[str, str] = {}
        blocks += [f"{section}={kind}\n{kind_text(section, kind, schema, shown)}" for kind, schema in kinds.items()]
    blocks.append("Flags\n" + FLAGS + ("  --bottom            the same as bottom=true\n" if name == "show" else ""))
    blocks.append("Examples\n" + "".join(f"  {example}\n" for example in EXAMPLES[name]))
    return "\n".join(blocks)


def section_schema(root: type, section: str) -> type:
    schema = next(entry.default_factory for entry in fields(root) if entry.name == section)
    assert isinstance(schema, type)
    return schema


def kind_text(section: str, kind: str, schema: type, shown: dict[str, str]) -> str:
    """The keys of one kind of a section; of those that an earlier kind has just so, the names only.

    Args:
        shown: a key's lines -> the kind that they are printed for; this one's are added.
    """
    lines, repeated = "", dict[str, list[str]]()
    for name, text in keys_texts(f"{section}.", schema).items():
        if name == "name":  # the group's choice, listed as such
            continue
        if text in shown:
            repeated.setdefault(shown[text], []).append(name)
        else:
            lines += text
            shown[text] = kind
    for other, names in repeated.items():
        said = f"as with {section}={other}: {', '.join(names)}"
        lines += textwrap.fill(said, WIDTH, initial_indent="  ", subsequent_indent="    ") + "\n"
    return lines or "  no key of its own\n"


def keys_texts(prefix: str, schema: type) -> dict[str, str]:
    """Name -> ``key=default``, meaning, type and range, in lines; of every key but sections."""
    texts = {}
    for entry in fields(schema):
        if is_section(entry):
            continue
        head = f"  {prefix}{entry.name}={default_text(entry)}"
        wrapped = textwrap.wrap(f"{entry.metadata['meaning']} ({range_text(entry)})", WIDTH - 36)
        lines = []
        if len(head) > 34:
            lines.append(head)
            head = ""
        lines += [f"{head:<36}{wrapped[0]}", *(" " * 36 + line for line in wrapped[1:])]
        texts[entry.name] = "\n".join(lines) + "\n"
    return texts


def default_text(entry: Field[Any]) -> str:
    value = entry.default_factory() if entry.default_factory is not MISSING else entry.default
    if isinstance(value, list):
        return "[" + ",".join(map(str, value)) + "]"
    text = OmegaConf.to_yaml({"value": value}).removeprefix("value: ").strip()
    return "..." if value == "???" else text.strip("'")


def range_text(entry: Field[Any]) -> str:
    limits = entry.metadata
    if limits["choices"]:
        return " | ".join(limits["choices"])
    bounds = [
        f"{sign} {limits[name]:g}"
        for name, sign in (("minimum", ">="), ("above", ">"), ("maximum", "<="), ("below", "<"))
        if limits[name] is not None
    ]
    return ", ".join([type_name(entry), *bounds])
