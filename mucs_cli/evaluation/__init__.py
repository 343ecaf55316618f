"""The registry of evaluations: one file in this folder and one YAML below ``conf/evaluation/`` each.

An evaluation's file is imported to show help and to complete keys, so that it imports torch, and whatever else is slow,
inside the functions that compute. Packages in this folder are not looked into.
"""

import importlib
import pkgutil

from mucs_cli.evaluation.base import Evaluation


def find_evaluations() -> dict[str, Evaluation]:
    """name -> evaluation, of every file in this folder that defines ``EVALUATION``; by name."""
    found = {}
    for module in pkgutil.iter_modules(__path__):
        if not module.ispkg:
            evaluation = getattr(importlib.import_module(f"{__name__}.{module.name}"), "EVALUATION", None)
            if evaluation is not None:
                found[evaluation.name] = evaluation
    return dict(sorted(found.items()))


EVALUATIONS = find_evaluations()
