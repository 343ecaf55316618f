"""References (``${...}``) in configurations from others: which are resolved, and how far they may unfold.

OmegaConf puts names of resolvers together from other references, and some resolvers make mappings out of text: what a
configuration names can then be seen only once it has run. So a reference has to name its resolver literally, and that
one has to be on a list.
"""

import re
from collections.abc import Iterator
from typing import Any

RESOLVERS = frozenset(
    {
        *("hydra", "now", "oc.deprecated", "oc.dict.keys", "oc.dict.values", "oc.env", "oc.select", "python_version"),
        *("score_mode", "sweep_folder"),
    }
)
"""What may stand before the colon; none of them runs code or reads text as a configuration."""
OPENING = "${"
REFERENCE = re.compile(r"\$\{\s*(?:(?P<resolver>[A-Za-z_][\w.]*)\s*:|[^$:{}'\"\\]*\})")
MOST_IN_A_STRING = 20
MOST_CHARACTERS = 10**8
"""Of what references unfold to, at most: each of a chain can double what it refers to."""


def fault(config: Any) -> tuple[str, str] | None:
    """What must not be resolved in a configuration: its key, and what it holds; None: nothing."""
    for key, text in strings(config):
        found = fault_of_text(text)
        if found is not None:
            return key, found
    unfolded = most_copies(config) * sum(len(text) for _, text in strings(config))
    return ("", "references that unfold to very much") if unfolded > MOST_CHARACTERS else None


def fault_of_text(text: str) -> str | None:
    for place in re.finditer(re.escape(OPENING), text):
        found = REFERENCE.match(text, place.start())
        if found is None:
            return f"{text[place.start() :][:40]!r}, whose name is not written out"
        if found["resolver"] and found["resolver"] not in RESOLVERS:
            return f"the resolver {found['resolver']}"
    return f"more than {MOST_IN_A_STRING} references in a string" if text.count(OPENING) > MOST_IN_A_STRING else None


def strings(node: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Dotted key and text of every string value."""
    if isinstance(node, str):
        yield path, node
    for key, value in children(node):
        yield from strings(value, f"{path}.{key}" if path else str(key))


def children(node: Any) -> Iterator[tuple[Any, Any]]:
    yield from node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()


def most_copies(config: Any) -> int:
    """How often at most a string can stand in what a configuration unfolds to.

    A value that holds n references can repeat another one n times, that one a third one, and so on: the product of n
    over all values, mappings and lists.
    """
    product = 1

    def count(node: Any) -> int:
        nonlocal product
        found = node.count(OPENING) if isinstance(node, str) else sum(count(value) for _, value in children(node))
        product = min(product * max(found, 1), MOST_CHARACTERS + 1)
        return found

    count(config)
    return product
