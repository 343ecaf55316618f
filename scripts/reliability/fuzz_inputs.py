"""Strategies of the fuzzer: sound content of a kind of file, made unsound."""

import copy
import json
import math
from typing import Any

import hypothesis.strategies as st
import torch
from safetensors.torch import save
from torch import Tensor

from mucs_cli.records import sealed
from mucs_cli.text import csv_cells, csv_text

TEXT = st.text(max_size=12) | st.sampled_from(
    ["", "file_name", "../x", "/etc/passwd", "a/0.png", "=1+1", "\x1b[31m", "[/x]", "\r"]
)
SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.just(10**30)
VALUE = st.recursive(SCALAR, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4))
DEEP = st.integers(20, 3000).map(lambda depth: "[" * depth + "]" * depth)


@st.composite
def damaged(draw: st.DrawFn, sound: bytes) -> bytes:
    """The bytes with a few of them changed, cut out or put in."""
    content = bytearray(sound)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(content) - 1)))
        match draw(st.sampled_from(["flip", "cut", "insert", "repeat", "end"])):
            case "flip" if content:
                content[place] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del content[place : place + draw(st.integers(1, 40))]
            case "insert":
                content[place:place] = draw(st.binary(min_size=1, max_size=8))
            case "repeat":
                content[place:place] = content[place : place + draw(st.integers(1, 40))]
            case "end":
                del content[place:]
    return bytes(content)


def flipped(sound: bytes) -> st.SearchStrategy[bytes]:
    """The bytes with one bit turned over."""

    def flip(place: tuple[int, int]) -> bytes:
        byte, bit = place
        return sound[:byte] + bytes([sound[byte] ^ 1 << bit]) + sound[byte + 1 :]

    return st.tuples(st.integers(0, len(sound) - 1), st.integers(0, 7)).map(flip)


@st.composite
def changed(draw: st.DrawFn, sound: Any) -> Any:
    """A JSON value with one or two of its parts replaced by another value, or left out."""
    value = copy.deepcopy(sound)
    for _ in range(draw(st.integers(1, 2))):
        node: Any = value
        parents: list[tuple[Any, Any]] = []
        while isinstance(node, dict | list) and node and (not parents or draw(st.booleans())):
            key = draw(st.sampled_from(list(node) if isinstance(node, dict) else list(range(len(node)))))
            parents.append((node, key))
            node = node[key]
        if not parents:
            return draw(VALUE)
        parent, key = parents[-1]
        if draw(st.booleans()):
            parent[key] = draw(VALUE)
        else:
            del parent[key]
    return value


def json_bytes(sound: Any) -> st.SearchStrategy[bytes]:
    """A JSON file: changed, damaged, random, or nested without end; changed ones with a checksum that fits, or none."""

    def seal(value: Any) -> Any:
        return sealed(value) if isinstance(value, dict) else value

    whole = json.dumps(seal(sound)).encode()
    other = changed(sound)
    return (
        other.map(lambda value: json.dumps(value).encode())
        | other.map(lambda value: json.dumps(seal(value)).encode())
        | damaged(whole)
        | flipped(whole)
        | VALUE.map(lambda value: json.dumps(value).encode())
        | DEEP.map(str.encode)
        | st.binary(max_size=60)
    )


def header_bytes(sound: dict[str, Any], data: bytes) -> st.SearchStrategy[bytes]:
    """A safetensors file with a changed header."""

    def file(header: Any, extra: int = 0) -> bytes:
        encoded = json.dumps(header).encode()
        return (len(encoded) + extra).to_bytes(8, "little", signed=False) + encoded + data

    return (
        changed(sound).map(file)
        | st.tuples(changed(sound), st.integers(0, 2**63)).map(lambda pair: file(*pair))
        | damaged(file(sound))
        | flipped(file(sound))
        | DEEP.map(lambda text: len(text).to_bytes(8, "little") + text.encode())
        | st.binary(max_size=60)
    )


@st.composite
def lines(draw: st.DrawFn, sound: Any) -> bytes:
    """A few lines, some of them sound, some not; the last one may be cut short."""
    line = st.just(json.dumps(sound).encode()) | json_bytes(sound) | damaged(json.dumps(sound).encode())
    return b"\n".join(draw(st.lists(line, max_size=4))) + draw(st.sampled_from([b"", b"\n"]))


def tensors_of(sound: dict[str, Tensor]) -> st.SearchStrategy[bytes]:
    """A file of these tensors: damaged, or sound with one of them of other values, type or shape."""

    def other(tensor: Tensor) -> st.SearchStrategy[Tensor]:
        places = st.tuples(
            st.integers(0, tensor.numel() - 1), st.sampled_from([-1, 1, 7, 2**31 - 1, math.nan, math.inf])
        )
        return (
            places.map(lambda place: tensor.flatten().double().index_fill(0, torch.tensor(place[0]), place[1]))
            .map(lambda values: values.nan_to_num(0) if not tensor.is_floating_point() else values)
            .map(lambda values: values.to(tensor.dtype).view(tensor.shape))
            | st.sampled_from([torch.float64, torch.float16, torch.bool]).map(tensor.to)
            | st.sampled_from([tensor[:0], tensor[:1], tensor[None], tensor.flatten()])
        )

    def with_other(name: str) -> st.SearchStrategy[bytes]:
        return other(sound[name]).map(lambda tensor: save(sound | {name: tensor.contiguous()}))

    whole, names = save(sound), sorted(sound)  # the library reads them back in any order
    lacking = st.sampled_from(names).map(lambda name: save({key: sound[key] for key in names if key != name}))
    return st.sampled_from(names).flatmap(with_other) | lacking | damaged(whole) | flipped(whole)


def cells_of(sound: bytes) -> st.SearchStrategy[bytes]:
    """A CSV file: damaged, or with one or two cells or rows of other text."""
    other = changed(csv_cells(sound.decode())).filter(lambda rows: isinstance(rows, list))
    rows = other.map(lambda rows: [row if isinstance(row, list) else [row] for row in rows])
    return rows.map(lambda rows: csv_text(rows).encode("utf-8", "replace")) | damaged(sound)
