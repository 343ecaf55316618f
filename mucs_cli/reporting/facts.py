"""Run facts: what the manifests record, as tables of text."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mucs_cli.artifacts import is_fingerprint
from mucs_cli.records import flatten
from mucs_cli.reporting.results import RunResults

FRAME = (
    "stage",
    "status",
    "format_version",
    "config",
    "inputs",
    "outputs",
    "versions",
    "queries",
    "results",
    "races",
    "seconds",
)
"""Manifest keys that have a table of their own, or say nothing to a reader."""
MANY_FILES = 8
"""A stage with more files than this is referred to its manifest for their hashes."""

MANY_VALUES = 6
"""A longer list is cut."""


@dataclass(frozen=True)
class FactTable:
    """A titled table of names and values; ``code`` where the values are hashes or identifiers."""

    title: str
    rows: list[tuple[str, str]]
    code: bool = False


def value_text(value: Any) -> str:
    """A JSON value as a reader would write it."""
    match value:
        case None:
            return "–"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}" if abs(value) < 10**9 else str(value)
        case float():
            return f"{value:.6g}"
        case list():
            shown = ", ".join(map(value_text, value[:MANY_VALUES])) or "–"
            return shown if len(value) <= MANY_VALUES else f"{shown}, … ({len(value):,} in all)"
    return str(value)


def duration(seconds: float | None) -> str:
    """Seconds as ``4.2 s``, ``3 min 20 s`` or ``2 h 5 min``."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds) // 60
    return f"{minutes} min {round(seconds) % 60} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def stage_manifests(results: RunResults) -> dict[str, dict[str, Any]]:
    """Every manifest the report draws on, by the stage's folder in the run; upstream first."""
    found = {"train": results.train, "sample": results.sample}
    for variant in results.variants:
        if variant.unlearn:
            found[f"unlearn/{variant.manifest.get('unlearn_variant')}"] = variant.unlearn
    found |= {f"score/{variant.name}": variant.manifest for variant in results.variants}
    found |= {f"evaluate/{name}": manifest for name, manifest in results.evaluations.items()}
    return {folder: manifest for folder, manifest in found.items() if manifest}


def fact_tables(results: RunResults) -> list[FactTable]:
    """All tables of the report's last part, the data first."""
    manifests = stage_manifests(results)
    tables = [data_table(results)]
    tables += [stage_table(folder, manifest) for folder, manifest in manifests.items()]
    tables += [versions_table(manifests.values()), fingerprint_table(results, manifests)]
    return tables


def identity(results: RunResults) -> list[tuple[str, str]]:
    """What the scores are of, and the scores: name and full SHA-256, each once."""
    found = [("data", str(results.data.get("fingerprint", "–")))]
    found += [("model", str(value)) for value in [results.sample.get("inputs", {}).get("model")] if value]
    found += [("queries", sha256_of(results.sample, "samples.safetensors"))]
    banks = {variant.manifest.get("inputs", {}).get("noise_bank"): None for variant in results.variants}
    found += [("noise bank", str(bank)) for bank in banks if bank]
    return [*found, *((f"scores of {v.name}", sha256_of(v.manifest, "scores.safetensors")) for v in results.variants)]


def sha256_of(manifest: Mapping[str, Any], output: str) -> str:
    return str(manifest.get("outputs", {}).get(output, {}).get("sha256", "–"))


def run_versions(results: RunResults) -> list[str]:
    """The versions of mucs, each with its git revision where that is known, that scored."""
    texts: dict[str, None] = {}
    for variant in results.variants:
        found = variant.manifest.get("versions", {})
        revision = f" (git {found['git']})" if "git" in found else ""
        texts[f"{found.get('mucs', '–')}{revision}"] = None
    return list(texts)


def data_table(results: RunResults) -> FactTable:
    channels, height, width = results.images.shape[1:]
    splits = [row.get("split", "") for row in results.index]
    rows = [(key, value_text(value)) for key, value in results.data.get("facts", {}).items() if value]
    rows += [("images", value_text(len(results.index)))]
    rows += [(f"images, split {split}", value_text(splits.count(split))) for split in sorted(set(splits)) if split]
    rows += [
        ("image size", f"{width} × {height} pixels, {'grayscale' if channels == 1 else f'{channels} channels'}"),
        ("raw values", f"0 to {results.levels}"),
    ]
    return FactTable("Data", rows)


def stage_table(folder: str, manifest: Mapping[str, Any]) -> FactTable:
    """A stage's configuration, then whatever else its manifest records."""
    rest = {key: value for key, value in manifest.items() if key not in FRAME}
    rows = [(key, value_text(value)) for key, value in (flatten(manifest.get("config", {})) | flatten(rest)).items()]
    return FactTable(folder, [*rows, ("took", duration(manifest.get("seconds")))])


def versions_table(manifests: Iterable[Mapping[str, Any]]) -> FactTable:
    """Package versions; where the stages ran with different ones, all of them."""
    found: dict[str, list[str]] = {}
    for manifest in manifests:
        for package, version in manifest.get("versions", {}).items():
            known = found.setdefault(package, [])
            if version not in known:
                known.append(str(version))
    return FactTable("Versions", [(package, ", ".join(known)) for package, known in found.items()])


def fingerprint_table(results: RunResults, manifests: Mapping[str, Mapping[str, Any]]) -> FactTable:
    """SHA-256 of what went into each stage and came out of it."""
    rows = [("data", str(results.data.get("fingerprint", "–")))]
    for folder, manifest in manifests.items():
        for key, value in manifest.get("inputs", {}).items():
            prints = {f" {query}": each for query, each in value.items()} if isinstance(value, dict) else {"": value}
            if len(prints) > MANY_FILES:
                rows.append((f"{folder} ← {key}, {len(prints)} queries", f"listed in {folder}/manifest.json"))
            else:
                rows += [(f"{folder} ← {key}{query}", each) for query, each in prints.items() if is_fingerprint(each)]
        outputs = manifest.get("outputs", {})
        if len(outputs) > MANY_FILES:
            rows.append((f"{folder} → {len(outputs)} files", f"listed in {folder}/manifest.json"))
        else:
            rows += [(f"{folder} → {file}", str(record.get("sha256", "–"))) for file, record in outputs.items()]
    return FactTable("Fingerprints (SHA-256): ← used, → written", rows, code=True)
