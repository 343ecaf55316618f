"""The registry of attribution methods: one file below this folder and one YAML below ``conf/method/`` each.

A method's file is imported to show help and to complete keys, so that it imports torch, and whatever else is slow,
inside the functions that compute.
"""

import importlib
import pkgutil

from mucs_cli.methods.base import Method


def find_methods() -> dict[str, Method]:
    """name -> method, of every file below this folder that defines ``METHOD``; ``mucs`` first, then by name."""
    found = {}
    for module in pkgutil.iter_modules(__path__):
        method = getattr(importlib.import_module(f"{__name__}.{module.name}"), "METHOD", None)
        if method is not None:
            found[method.name] = method
    return dict(sorted(found.items(), key=lambda item: (item[0] != "mucs", item[0])))


METHODS = find_methods()
