"""``mucs report``: everything a run found, on one page that needs no network."""

from pathlib import Path
from typing import Any

from mucs_cli.artifacts import fingerprint, is_intact, write_atomic, write_text
from mucs_cli.config import PipelineConfig, result_config
from mucs_cli.data.dataset import load_dataset
from mucs_cli.errors import UserError
from mucs_cli.records import read_manifest
from mucs_cli.reporting.facts import stage_manifests
from mucs_cli.reporting.page import render_report, template_text
from mucs_cli.reporting.pictures import top_picture
from mucs_cli.reporting.results import RunResults
from mucs_cli.runtime import log, stage_log
from mucs_cli.schemas import ReportConfig
from mucs_cli.stage_folder import Stage, first_difference
from mucs_cli.stages.context import Context
from mucs_cli.stages.loading import recorded_data


def run(context: Context) -> None:
    """Writes ``report/index.html`` and, with ``report.images``, ``report/top.png``, unless they are up to date.

    Raises:
        UserError: nothing was scored yet, ``report.k`` or ``report.group_k`` is too large, ``report.group_by`` names no
            column, or a file of the run is damaged.
    """
    config = context.config
    assert isinstance(config, PipelineConfig)
    results = RunResults(context.run)
    if not (context.run / "data" / "images.safetensors").exists():
        load_dataset(recorded_data(config.data, context.run), context.run)  # the decoded images were cleaned
    folder = context.folder("report")
    identity = {"config": {"report": result_config(config.report)}, "inputs": inputs(results)}
    if is_current(folder, identity):
        log.info("report: up to date (%s)", folder / "index.html")
        return
    page = render_report(results, config.report)  # which refuses what cannot be, before there is a folder
    with stage_log(folder):
        write(Stage(folder, "report", identity), page, results, config.report)


def write(stage: Stage, page: str, results: RunResults, settings: ReportConfig) -> None:
    """Fills the stage's folder."""
    folder = stage.folder
    for name in results.unfinished:
        log.warning("report: score/%s is not finished; left out", name)
    for name in results.unfinished_evaluations:
        log.warning("report: evaluate/%s is not finished; left out", name)
    stage.begin()
    outputs = [folder / "index.html"]
    write_text(outputs[0], page)
    if settings.images:
        outputs.append(folder / "top.png")
        picture = top_picture(results, results.variants[0], settings.k, settings.exclude_exact)
        write_atomic(outputs[1], lambda temporary: picture.save(temporary, "PNG", optimize=True))
    else:
        (folder / "top.png").unlink(missing_ok=True)
    stage.finish({"variants": results.variant_names}, outputs)
    log.info("report: %s", " and ".join(map(str, outputs)))


def inputs(results: RunResults) -> dict[str, Any]:
    """What decides the page: the manifests it shows, which hold the tensors' hashes, and the page's own sources."""
    manifests = stage_manifests(results)
    return {
        "data": fingerprint(results.data),
        **{folder: fingerprint(manifest) for folder, manifest in manifests.items()},
        "query_files": fingerprint(list(results.query_rows.values())),
        "unfinished": results.unfinished + results.unfinished_evaluations,
        "page": fingerprint(template_text()),
    }


def is_current(folder: Path, identity: dict[str, Any]) -> bool:
    """Whether the folder holds this very report, intact."""
    try:
        manifest = read_manifest(folder / "manifest.json")
    except UserError:
        return False
    if first_difference(identity, {key: manifest.get(key, {}) for key in identity}) is not None:
        return False
    return all(is_intact(folder, manifest, name) for name in manifest.get("outputs", {}))
