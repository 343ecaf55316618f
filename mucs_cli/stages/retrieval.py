"""Retrieval in a run: what should be found for each query, from the run's files, and how well each variant finds it."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from mucs_cli.artifacts import fingerprint
from mucs_cli.data.image_folder import first_folder
from mucs_cli.data.labels import label_of
from mucs_cli.data.metadata import as_text
from mucs_cli.data.query_folder import LABEL_COLUMN
from mucs_cli.errors import UserError, did_you_mean
from mucs_cli.evaluation.measures.retrieval import Mask, relevant_by_id, relevant_by_value, retrieval
from mucs_cli.evaluation.measures.statistics import CONFIDENCE
from mucs_cli.evaluation.measures.statistics import Estimate as Interval
from mucs_cli.reporting.results import RunResults
from mucs_cli.reporting.tables import Estimate, Table
from mucs_cli.rng import generator
from mucs_cli.stages.context import Context
from mucs_cli.stages.finished import FinishedScores
from mucs_cli.stages.top_evaluator import TopEvaluator

MEANING = {
    "class": "of the query's class",
    "column": "with the query's {column}",
    "copies": "with exactly the query's pixels",
    "causes": "named in the query's {column}",
}
MEASURES = ("precision", "recall", "average_precision")


class RetrievalEvaluator(TopEvaluator):
    """How well the rankings find what ``evaluation.relevant`` says.

    Attributes:
        queries: ids, sorted.
        relevant: whether each image of the data set should be found; bool [len(queries), all images].
    Raises:
        UserError: see ``TopEvaluator`` and ``Relevance``; or no scored image is relevant for any query.
    """

    def __init__(self, context: Context):
        super().__init__(context)
        self.queries = sorted({query for variant in self.variants for query in self.queries_of(variant)})
        self.relevant = Relevance(context, self.queries, self.variants[0].example_ids).mask()
        if not self.relevant[:, self.variants[0].example_ids].any():
            raise UserError(
                "evaluation.relevant",
                f"got {self.config.relevant}; no training image is {self.meaning()} for any of {len(self.queries)} "
                "queries. Choose another value.",
            )
        self.inputs["relevant"] = fingerprint(self.relevant)

    def meaning(self) -> str:
        return MEANING[self.config.relevant].format(column=self.config.column)

    def evaluate(self) -> dict[str, Any]:
        scored = self.relevant[:, self.variants[0].example_ids]
        return {
            "relevant": self.config.relevant,
            "column": self.config.column,
            "k": self.k,
            "num_images": self.num_images,
            "num_resamples": self.config.num_resamples,
            "confidence": CONFIDENCE,
            "seed": self.config.seed,
            "num_relevant": dict(zip(map(str, self.queries), scored.sum(axis=1).tolist(), strict=True)),
            "variants": [self._found(variant) for variant in self.variants],
        }

    def _found(self, variant: FinishedScores) -> dict[str, Any]:
        queries = self.queries_of(variant)
        relevant = self.relevant[np.searchsorted(self.queries, queries)][:, variant.example_ids]
        # one stream for all: every variant is judged on the same resamples of the queries
        source = generator(self.config.seed, "retrieval_resamples")
        found = retrieval(variant.rows(queries).numpy(), relevant, self.k, source, self.config.num_resamples)
        return {
            "variant": variant.name,
            "num_queries": len(queries) - found.num_without,
            "num_without_relevant": found.num_without,
            "precision": numbers(found.precision, found.random_precision),
            "recall": numbers(found.recall, found.random_recall),
            "average_precision": numbers(found.average_precision, found.random_average_precision),
        }

    def table(self, results: dict[str, Any]) -> Table:
        rows = []
        for entry in results["variants"]:
            cells = [entry["variant"], entry["num_queries"], entry["num_without_relevant"]]
            for name in MEASURES:
                found = entry[name]
                cells += [Estimate(found["value"], found["low"], found["high"]), found["random"]]
            rows.append(tuple(cells))
        return Table(
            f"top {results['k']} of {results['num_images']} images; relevant: those {self.meaning()}; "
            f"{results['confidence']:.0%} interval over queries; random: random rankings; without: queries left out, "
            "for which nothing is relevant",
            (
                *("variant", "queries", "without", "precision", "random_precision", "recall", "random_recall"),
                *("average_precision", "random_average"),
            ),
            rows,
        )


def numbers(found: Interval, by_chance: float | None) -> dict[str, float | None]:
    return {"value": found.value, "low": found.low, "high": found.high, "random": by_chance}


class Relevance:
    """What should be found for each query.

    Args:
        context: the command; its evaluation's section says what is relevant.
        queries: ids.
        example_ids: of the images that are scored.
    Raises:
        UserError: ``evaluation.column`` is missing, has no effect or names no column, the queries have no classes, or a
            cell names no scored image.
    """

    def __init__(self, context: Context, queries: Sequence[int], example_ids: np.ndarray):
        self.config, self.queries, self.example_ids = context.config.evaluation, queries, example_ids
        self.run = RunResults(context.run)
        self.path = context.folder("sample", "queries.csv")
        relevant, column = self.config.relevant, self.config.column
        if (relevant in ("column", "causes")) != (column is not None):
            raise UserError(
                "evaluation.column",
                f"got {column} with evaluation.relevant={relevant}; expected a column with relevant=column or causes, "
                "and with nothing else. Set both or neither.",
            )

    def mask(self) -> Mask:
        """bool [len(queries), all images of the data set]."""
        if self.config.relevant == "class":
            return relevant_by_value(self._query_classes(), self._column(self.run.data["label_column"]))
        if self.config.relevant == "column":
            return relevant_by_value(self._query_values(), self._column(self._known_column()))
        ids = self._causes() if self.config.relevant == "causes" else self._copies()
        return relevant_by_id(ids, np.arange(len(self.run.index)))

    def _copies(self) -> list[list[int]]:
        return [self.run.exact_copies[query] for query in self.queries]

    def _causes(self) -> list[list[int]]:
        id_of = {row["file"]: example_id for example_id, row in enumerate(self.run.index)}
        id_of = {
            str(example_id): int(example_id) for example_id in self.example_ids
        } | id_of  # a file's name comes first
        scored = set(self.example_ids.tolist())
        found = []
        for query, named in zip(self.queries, self._query_values(), strict=True):
            for name in sorted(named):
                if id_of.get(name) not in scored:
                    raise UserError(
                        f"{self.path}, query {query}",
                        f"got {name!r} in {self.config.column}; expected file names or example_ids of training images, "
                        f"with {self.config.separator!r} between several (evaluation.separator). Correct it.",
                    )
            found.append([id_of[name] for name in named])
        return found

    # --- values ------------------------------------------------------------------------------------------------------

    def _known_column(self) -> str:
        column, known = self.config.column, list(self.run.metadata(0))
        if column not in known:
            raise UserError(
                "evaluation.column",
                f"got {column!r}; expected one of the data's ({', '.join(known) or 'it has none'})."
                f"{did_you_mean(column, known) or ' Choose one.'}",
            )
        return str(column)

    def _column(self, name: str) -> list[set[str]]:
        """Of every image; a class is one value, whatever is in its name."""
        cells = [row[name] for row in self.run.index]
        return [{cell} if self.config.relevant == "class" else values_of(cell, self.config.separator) for cell in cells]

    def _query_values(self) -> list[set[str]]:
        column, rows = self.config.column, self.run.query_rows
        known = [name for name in next(iter(rows.values()), {}) if name != "query"]
        if column not in known:
            has = f"the queries have {', '.join(known)}" if known else "the queries were sampled and have no columns"
            raise UserError(
                "evaluation.column",
                f"got {column!r}; {has}.{did_you_mean(column, known)} Columns come from the metadata of queries.path, "
                "when mucs sample reads them.",
            )
        return [values_of(rows[query][column], self.config.separator) for query in self.queries]

    def _query_classes(self) -> list[set[str]]:
        names: list[str] = self.run.data["class_names"]
        if not names:
            raise UserError("evaluation.relevant", "got class; the data has no classes. Use column, copies or causes.")
        condition: Tensor | None = self.run.samples.get("condition")
        if condition is not None and not condition.is_floating_point():
            return [{names[int(condition[query])]} for query in self.queries]
        rows = self.run.query_rows
        classes = [self._class_in(rows[query], query, names) if query in rows else set() for query in self.queries]
        if not any(classes):
            raise UserError(
                "evaluation.relevant",
                "got class; the queries have none: the model is not conditioned on classes, and no column label or "
                "folder of the queries names one. Use column, copies or causes.",
            )
        return classes

    def _class_in(self, row: dict[str, str], query: int, names: list[str]) -> set[str]:
        """As ``mucs sample`` reads it: from the column of the class, or else from the folder."""
        text = row.get(self.run.data["label_column"]) or row.get(LABEL_COLUMN)
        if text:
            return {names[label_of(text, names, f"{self.path}, query {query}")]}
        return {first_folder(row["file"])} & set(names)


def values_of(cell: str, separator: str | None) -> set[str]:
    """The values in a cell: of a JSON list its elements, else what stands between separators; none in an empty one."""
    try:
        listed = json.loads(cell) if cell.startswith("[") else None
    except ValueError:
        listed = None
    parts = (
        [as_text(value) for value in listed] if listed is not None else cell.split(separator) if separator else [cell]
    )
    return {part.strip() for part in parts} - {""}
