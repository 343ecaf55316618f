"""A finished run as the stages leave it: real digits, and scores that are a pixel similarity."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits

from mucs_cli.artifacts import fingerprint, sha256_file, write_json, write_record, write_tensors, write_text
from mucs_cli.config import PipelineConfig, ShowConfig
from mucs_cli.records import read_json
from mucs_cli.schemas import DataConfig, DigitsConfig, ReportConfig
from mucs_cli.stage_folder import Stage
from mucs_cli.stages import report, show
from mucs_cli.stages.context import Context

LEVELS = 16
METADATA = "label"
TABLE = "variant,queries,auc,auc_low,auc_high,expected\nmucs,3,0.66,0.5,0.75,0.5\npixel <b>,3,0.4,,,0.5\n"
MARKDOWN = (
    "results of {name}, 95% intervals; of what; **best**; _not distinguishable from the best_\n\n"
    "| variant | queries | auc | expected |\n| :-- | --: | --: | --: |\n"
    "| mucs | 3 | **0.660 [0.500, 0.750]** | 0.500 |\n| pixel <b> | 3 | _0.400_ | 0.500 |\n"
)
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="120" height="60" viewBox="0 0 120 60">{}</svg>'
LINE_ART = SVG.format('<style>rect{fill:#0072b2}</style><rect style="stroke:#000" width="120" height="60"/>')
PHOTOGRAPH = SVG.format('<image width="1" height="1" href="data:image/png;base64,iVBORw0KGgo="/>')


class RunBuilder:
    """Writes a run's folders.

    Query q is a noisy version of digit ``100 + q``, but for the last one, which is digit 3 itself, an exact copy.
    A score falls with the mean squared difference to the query; some are negative.
    """

    def __init__(self, run: Path, num_images: int = 60, num_queries: int = 3):
        self.run, self.levels = run, LEVELS
        digits = load_digits()
        raw = digits.images.astype(np.uint8)[:, None]
        self.raw, self.label = raw[:num_images], digits.target[:num_images]
        self.files = [f"digits[{i}]" for i in range(num_images)]
        noise = torch.randn(num_queries, 1, 8, 8, generator=torch.Generator().manual_seed(0)).numpy()
        self.query = (raw[100 : 100 + num_queries] / (LEVELS / 2) - 1 + 0.2 * noise).clip(-1, 1).astype(np.float32)
        self.query[-1] = self.image(self.raw[3])
        self.held_out: tuple[int, ...] = ()

    @staticmethod
    def image(raw: np.ndarray) -> np.ndarray:
        return (raw * (2 / LEVELS) - 1).astype(np.float32)

    @property
    def score(self) -> np.ndarray:
        """[Q, N]: 0.1 minus a quarter of the mean squared difference."""
        difference = self.query[:, None] - self.image(self.raw)[None]
        return (0.1 - 0.25 * (difference**2).mean(axis=(2, 3, 4))).astype(np.float32)

    def data(self, label: Sequence[str] | None = None, metadata: Mapping[str, Sequence[str]] | None = None) -> None:
        """``metadata``: columns besides the label, a cell an image."""
        columns = metadata or {}
        folder = self.run / "data"
        stage = Stage(folder, "data", {"config": {"data": {"name": "digits", "holdout": 0}}})
        stage.begin()
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(["example_id", "file", "sha256", "split", METADATA, *columns])
        for i, file in enumerate(self.files):
            shown = str(self.label[i]) if label is None else label[i]
            rows.writerow(
                [i, file, fingerprint(self.raw[i]), "training", shown, *[cells[i] for cells in columns.values()]]
            )
        write_text(folder / "index.csv", text.getvalue())
        write_tensors(folder / "images.safetensors", {"image": torch.from_numpy(self.raw)})
        facts = {
            "name": "Optical Recognition of Handwritten Digits",
            "source": "UCI Machine Learning Repository",
            "licence": "CC BY 4.0",
            "citation": "E. Alpaydin, C. Kaynak (1998).",
        }
        stage.finish(
            {"facts": facts, "levels": self.levels, "fingerprint": fingerprint(self.raw)},
            [folder / "index.csv", folder / "images.safetensors"],
        )

    def train(self) -> None:
        folder = self.run / "train"
        config = {
            "model": {"name": "dit", "size": "tiny"},
            "training": {"num_steps": 3000, "learning_rate": 1e-3, "seed": 0},
        }
        stage = Stage(folder, "train", {"config": config, "inputs": {"dataset": fingerprint(self.raw)}})
        stage.begin()
        noise = np.random.default_rng(0).lognormal(0, 0.08, 300)
        steps = np.arange(10, 3010, 10)
        losses = (0.22 + 0.9 * np.exp(-steps / 180)) * noise
        lines = [f"{step},{loss:.6g},0.001" for step, loss in zip(steps, losses, strict=True)]
        write_text(folder / "metrics.csv", "\n".join(["step,loss,learning_rate", *lines]) + "\n")
        stage.finish({"device": "cpu", "parameters": 242_000}, [folder / "metrics.csv"])

    def sample(self, files: Sequence[str] = (), picture: np.ndarray | None = None) -> None:
        """``files``: the queries were read from these; ``picture``: what they look like, where they are latents."""
        folder = self.run / "sample"
        config = {"sampler": {"num_steps": 32, "rho": 7.0}, "queries": {"num": len(self.query), "seed": 0}}
        stage = Stage(folder, "sample", {"config": config, "inputs": {"model": "0" * 64}})
        stage.begin()
        count = len(self.query)
        tensors = {
            "image": torch.from_numpy(self.query),
            "seed": torch.arange(count) + 7_000_000_000,
            "condition": torch.arange(count) % 10,
            "role": torch.tensor([2 if query in self.held_out else 0 for query in range(count)]),
        }
        if picture is not None:
            tensors["picture"] = torch.from_numpy(picture)
        write_tensors(folder / "samples.safetensors", tensors)
        if files:
            text = io.StringIO()
            rows = csv.writer(text, lineterminator="\n")
            rows.writerow(["query", "file", "prompt"])
            rows.writerows([q, file, f"prompt of {file}"] for q, file in enumerate(files))
            write_text(folder / "queries.csv", text.getvalue())
        stage.finish(
            {"device": "cpu", "seeds": {"queries": 0}, "queries": self.query_prints(count)},
            [folder / "samples.safetensors", *([folder / "queries.csv"] if files else [])],
        )

    def query_prints(self, count: int) -> dict[str, str]:
        """Query -> its fingerprint, of the first ``count``."""
        return {str(q): fingerprint(self.query[q]) for q in range(count)}

    def variant(
        self,
        name: str = "mucs",
        score: np.ndarray | None = None,
        forget_weight: float = 0.2,
        unreached: Sequence[int] = (),
        dataset: str | None = None,
        unlearns: bool = True,
        method: str = "mucs",
        bounded: bool = True,
    ) -> None:
        """One variant.

        Args:
            name, score, forget_weight: as in its folders; ``score`` [Q, N], of the first Q queries.
            unreached: queries that did not reach the bound.
            dataset: fingerprint of the data.
            unlearns: whether its method unlearns.
            method: its name.
            bounded: whether its unlearning has a bound.
        """
        config = {
            "method": {"name": method, "epsilon": 1e-3},
            "unlearning": {"forget_weight": forget_weight, "tolerance": 0.95},
        }
        results = [
            {
                "query": q,
                "num_steps": 1000 if q in unreached else 30 + q,
                "reached_bound": q not in unreached if bounded else None,
                "base_query_loss": 0.25 + q / 64,
                "query_loss": 1.125 + q / 64,
                "forget_loss": 0.96,
                "retain_loss": 0.31,
                "seconds": 2.5,
            }
            for q in range(len(self.query))
        ]
        if unlearns:
            stage = Stage(self.run / "unlearn" / name, "unlearn", {"config": config, "inputs": {"model": "0" * 64}})
            stage.begin()
            bound = {"null_loss": 1.0078, "null_loss_source": "closed form"} if bounded else {}
            stage.finish({"results": results} | bound, [])
        folder = self.run / "score" / name
        config = {"method": config["method"], "noise_bank": {"num_draws": 100, "grid": "truncated", "seed": 0}}
        inputs = {"dataset": dataset or fingerprint(self.raw)}
        stage = Stage(folder, "score", {"config": config, "inputs": inputs})
        stage.begin()
        values = self.score if score is None else score
        tensors = {
            "score": torch.from_numpy(values),
            "query_id": torch.arange(len(values)),
            "example_id": torch.arange(values.shape[1]),
        }
        write_tensors(folder / "scores.safetensors", tensors)
        stage.finish(
            {"device": "cpu", "queries": self.query_prints(len(values))}
            | ({"unlearn_variant": name} if unlearns else {}),
            [folder / "scores.safetensors"],
        )

    def ensemble(self, members: Sequence[str], spearman: float | None, overlap: float) -> None:
        """A variant of that name whose members agree as given."""
        self.variant("ensemble", self.score, unlearns=False, method="ensemble")
        folder, count = self.run / "score" / "ensemble", len(members)
        found = {
            "members": list(members),
            "weights": [float(place) for place in range(1, count + 1)],
            "queries": [0, 1, 2],
            "spearman": [[spearman] * count] * count,
            "k": 7,
            "top_k_overlap": [[overlap] * count] * count,
            "expected_top_k_overlap": 0.125,
        }
        write_json(folder / "members.json", found)
        manifest = read_json(folder / "manifest.json")
        manifest["config"]["method"]["combine"] = "rank_mean"
        manifest["outputs"]["members.json"] = {"sha256": sha256_file(folder / "members.json"), "bytes": 1}
        write_record(folder / "manifest.json", manifest)

    def evaluation(self, name: str = "overlap", charts: Mapping[str, str] | None = None) -> None:
        """``charts``: name -> SVG."""
        folder = self.run / "evaluate" / name
        scores = read_json(self.run / "score" / "mucs" / "manifest.json")["outputs"]["scores.safetensors"]["sha256"]
        inputs = {"variants": ["mucs"], "queries": "all", "scores of mucs": scores}
        stage = Stage(folder, "evaluate", {"config": {"evaluation": {"name": name, "k": 5}}, "inputs": inputs})
        stage.begin()
        write_text(folder / "table.csv", TABLE)
        write_text(folder / "table.md", MARKDOWN.format(name=name))
        drawn = [folder / "charts" / f"{chart}.svg" for chart in charts or {}]
        for path, svg in zip(drawn, (charts or {}).values(), strict=True):
            write_text(path, svg)
        stage.finish({"counts": {"models": 3}}, [folder / "table.csv", folder / "table.md", *drawn])

    def all(self) -> "RunBuilder":
        self.data()
        self.train()
        self.sample()
        self.variant()
        return self


def make_report(run: Path, data: DataConfig | None = None, **settings: Any) -> Path:
    """``mucs report report.<key>=<value>``; returns the page's path."""
    config = PipelineConfig(run=str(run), data=data or DigitsConfig(), report=ReportConfig(**settings))
    report.run(Context("report", config, run))
    return run / "report" / "index.html"


def show_run(run: Path, **settings: Any) -> None:
    """``mucs show <key>=<value>``."""
    show.run(Context("show", ShowConfig(run=str(run), **settings), run))
