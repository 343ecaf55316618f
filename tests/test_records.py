"""Records, tensor files and files in the making: damage is noticed, wherever it hits."""

import json
import os
import pickle
import random
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mucs_cli import locks
from mucs_cli.artifacts import empty, read_tensors, write_record, write_tensors
from mucs_cli.block_file import BlockFile, map_tensor
from mucs_cli.errors import DamagedError, UserError
from mucs_cli.records import read_json, read_manifest, read_record
from mucs_cli.stage_folder import Stage
from mucs_cli.stages.status import progress_of
from mucs_cli.tracking import last_line

RECORD: dict[str, Any] = {
    "format_version": 1,
    "config": {"training": {"learning_rate": 0.004, "ema": None, "name": "dächer", "nan": float("inf")}},
    "queries": {"0": "a" * 64},
    "outputs": {"x.safetensors": {"sha256": "b" * 64, "bytes": 12}},
    "seconds": 1.5,
}


def test_every_byte_that_flips_in_a_record_is_noticed_or_changes_nothing(tmp_path: Path) -> None:
    path, chance = tmp_path / "manifest.json", random.Random(0)
    write_record(path, RECORD)
    whole, noticed = path.read_bytes(), 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << chance.randrange(8)]) + whole[place + 1 :])
        try:
            found = read_manifest(path)
        except DamagedError as error:
            assert error.subject == str(path)
            noticed += 1
        else:
            assert {key: found[key] for key in RECORD} == RECORD
    assert noticed > 0.8 * len(whole)


def test_a_record_reads_back_without_its_checksum_and_one_of_an_earlier_version_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    write_record(path, RECORD)
    assert read_record(path) == RECORD
    path.write_text(json.dumps(RECORD))
    assert read_record(path) == RECORD


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("outputs", {"../x": {"sha256": "a", "bytes": 1}}),
        ("outputs", {"/etc/passwd": {"sha256": "a", "bytes": 1}}),
        ("outputs", ["x"]),
        ("outputs", {"x": {"sha256": None}}),
        ("queries", {"one": "a"}),
        ("queries", {"1": 5}),
        ("results", [1]),
        ("results", [{"num_steps": 3}]),
        ("results", [{"query": "0"}]),
        ("results", [{"query": 0, "num_steps": "3"}]),
        ("queries", {"1" * 5000: "a"}),
        ("seconds", float("inf")),
        ("seconds", float("nan")),
        ("seconds", -1),
        ("config", []),
        ("unlearn_variant", "../../elsewhere"),
        ("unlearn_variant", "a/b"),
        ("seconds", "long"),
        ("config", {"method": "mucs"}),
        ("levels", 0),
        ("class_names", [1]),
        ("skipped", ["a.png"]),
        ("top_k", "36"),
        ("outputs", {"x": {"sha256": "a"}}),
    ],
)
def test_a_manifest_of_another_form_or_that_leads_out_of_its_folder_is_refused(
    tmp_path: Path, part: str, value: Any
) -> None:
    write_record(tmp_path / "manifest.json", RECORD | {part: value})
    with pytest.raises(UserError, match=f"got {part} of another form"):
        read_manifest(tmp_path / "manifest.json")


def test_a_part_of_a_manifest_that_is_asked_for_and_missing_is_named(tmp_path: Path) -> None:
    write_record(tmp_path / "manifest.json", RECORD)
    found = read_manifest(tmp_path / "manifest.json")
    assert found == RECORD
    assert pickle.loads(pickle.dumps(found)) == RECORD
    for ask in (lambda: found["inputs"], lambda: found["config"]["method"], lambda: found["outputs"]["y"]["sha256"]):
        with pytest.raises(DamagedError, match=r"manifest\.json: has no '(inputs|method|y)' where mucs writes one"):
            ask()
    assert found.get("inputs") is None


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "5", '{"a": ' * 60 + "1" + "}" * 60, "\x00", ""])
def test_what_is_no_record_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError):
        read_manifest(tmp_path / "manifest.json")


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_regular_file_is_refused_and_not_read(tmp_path: Path, kind: str) -> None:
    for path in (tmp_path / "manifest.json", tmp_path / "progress.jsonl", tmp_path / "x.journal"):
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "device":
            path.symlink_to("/dev/zero")
        else:
            path.mkdir()
    with pytest.raises(DamagedError, match=r"manifest\.json: cannot be read as JSON"):
        read_json(tmp_path / "manifest.json")
    assert last_line(tmp_path) == {}
    assert progress_of(tmp_path) == "unfinished"


# --- tensors ---------------------------------------------------------------------------------------------------------


def test_a_tensor_file_without_a_manifest_tells_by_itself_that_a_bit_flipped(tmp_path: Path) -> None:
    path, chance = tmp_path / "state.safetensors", random.Random(0)
    tensors = {
        "a": torch.randn(5, 3),
        "empty": torch.zeros(0, 2),
        "step": torch.tensor(7),
        "half": torch.ones(3).bfloat16(),
    }
    write_tensors(path, tensors)
    whole = path.read_bytes()
    assert {name: t.tolist() for name, t in read_tensors(path).items()} == {n: t.tolist() for n, t in tensors.items()}
    start = 8 + int.from_bytes(whole[:8], "little")
    for place in range(start, len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << chance.randrange(8)]) + whole[place + 1 :])
        with pytest.raises(DamagedError, match="checksum differs"):
            read_tensors(path)
    for place in range(start):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << chance.randrange(8)]) + whole[place + 1 :])
        try:
            found = read_tensors(path)
        except DamagedError:
            continue
        assert {name: t.tolist() for name, t in found.items()} == {n: t.tolist() for n, t in tensors.items()}, place


def header(entry: Any, length: int | None = None, data: bytes = b"\0" * 24) -> bytes:
    encoded = json.dumps({"x": entry}).encode() if not isinstance(entry, bytes) else entry
    return (len(encoded) if length is None else length).to_bytes(8, "little") + encoded + data


GOOD = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        header(GOOD, 2**40),
        header(GOOD, 2**63),
        header(GOOD, data=b"\0" * 23),
        header(GOOD | {"shape": [2, 4]}),
        header(GOOD | {"shape": [-2, -3]}),
        header(GOOD | {"shape": [2**40, 2**40]}),
        header(GOOD | {"shape": [True, 6]}),
        header(GOOD | {"shape": "ab"}),
        header(GOOD | {"data_offsets": [-24, 0]}),
        header(GOOD | {"data_offsets": [0]}),
        header(GOOD | {"data_offsets": [24, 48]}),
        header(GOOD | {"dtype": "F99"}),
        header(GOOD | {"dtype": ["F32"]}),
        header([]),
        header(5),
        header(b"[]"),
        header(b"[" * 100_000),
        header(b'{"y": 1}'),
    ],
)
@pytest.mark.parametrize("writable", [False, True])
def test_a_wrong_header_is_refused_and_the_file_left_as_it_is(tmp_path: Path, content: bytes, writable: bool) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.safetensors: cannot be read"):
        map_tensor(path, "x", writable)
    assert path.read_bytes() == content
    path.write_bytes(header(GOOD))
    assert map_tensor(path, "x").shape == (2, 3)


# --- files filled block by block -------------------------------------------------------------------------------------

BLOCKS = 4
CHECKSUMS = [zlib.crc32(np.full(3, block + 1, np.float32)) for block in range(BLOCKS)]


def begun(path: Path, done: int, identity: str = "one") -> BlockFile:
    file = BlockFile(path, {"x": ("float32", (BLOCKS, 3))}, identity)
    for block in range(done):
        file.arrays["x"][block] = block + 1
        file.commit(block, file.arrays["x"][block])
    return file


def held(path: Path) -> set[int]:
    """The blocks that a later attempt goes on with."""
    file = begun(path, 0)
    return {block for block in range(BLOCKS) if file.holds(block, file.arrays["x"][block])}


def test_what_was_cut_short_in_the_making_is_begun_afresh(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    begun(path, 3)
    assert held(path) == {0, 1, 2}
    partial = path.with_name("x.safetensors.partial")
    partial.write_bytes(partial.read_bytes()[:-5])
    assert held(path) == set()


def test_a_journal_that_was_cut_short_twice_loses_the_cut_blocks_only(tmp_path: Path) -> None:
    path, journal = tmp_path / "x.safetensors", tmp_path / "x.safetensors.journal"
    begun(path, 2)
    journal.write_text(journal.read_text()[:-9])
    assert held(path) == {0}
    file = begun(path, 0)
    file.arrays["x"][2] = 3
    file.commit(2, file.arrays["x"][2])
    assert held(path) == {0, 2}


def test_a_block_in_which_a_bit_has_flipped_is_not_gone_on_with(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "x.safetensors"
    begun(path, 3)
    assert held(path) == {0, 1, 2}
    partial = path.with_name("x.safetensors.partial")
    content = bytearray(partial.read_bytes())
    content[-12 * (BLOCKS - 1) - 5] ^= 1  # in the first of them, each of which is 12 bytes
    partial.write_bytes(content)
    assert held(path) == {1, 2}
    assert "x.safetensors.partial: a part of it is damaged; computed again" in caplog.text


def test_a_journal_never_names_a_block_that_was_not_done_whichever_byte_flips(tmp_path: Path) -> None:
    path, journal = tmp_path / "x.safetensors", tmp_path / "x.safetensors.journal"
    begun(path, 2)
    whole, lost = journal.read_bytes(), 0
    for place in range(len(whole)):
        for bit in range(8):
            journal.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            file = BlockFile.__new__(BlockFile)
            file.identity, file.journal, file.partial = "one", journal, path.with_name("x.safetensors.partial")
            done = file._finished_blocks(file.partial.stat().st_size)
            assert done.items() <= {(0, CHECKSUMS[0]), (1, CHECKSUMS[1])}
            lost += len(done) < 2
    assert lost


def test_a_link_in_the_place_of_a_file_in_the_making_is_not_written_through(tmp_path: Path) -> None:
    path, victim = tmp_path / "x.safetensors", tmp_path / "victim"
    for name in ("x.safetensors.partial", "x.safetensors.journal"):
        victim.write_text("precious")
        (tmp_path / name).symlink_to(victim)
        begun(path, 1)
        assert victim.read_text() == "precious"
        path.with_name("x.safetensors.journal").unlink()


# --- stages ----------------------------------------------------------------------------------------------------------


def stage(folder: Path, **arguments: Any) -> Stage:
    return Stage(folder, "score", {"config": {"a": arguments.pop("a", 1)}, "inputs": {}}, **arguments)


def finished(folder: Path) -> Path:
    made = stage(folder)
    assert not made.is_done()
    made.begin()
    write_tensors(folder / "x.safetensors", {"x": torch.ones(3)})
    made.finish({}, [folder / "x.safetensors"])
    return folder / "x.safetensors"


def test_a_stage_whose_output_is_gone_or_cut_short_is_not_up_to_date(tmp_path: Path) -> None:
    path = finished(tmp_path / "score")
    assert stage(tmp_path / "score").is_done()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"x\.safetensors: is gone or not whole.*overwrite=true"):
        stage(tmp_path / "score").is_done()
    path.unlink()
    with pytest.raises(UserError, match=r"x\.safetensors: is gone or not whole"):
        stage(tmp_path / "score").is_done()
    assert not stage(tmp_path / "score", overwrite=True).is_done()
    assert not (tmp_path / "score").exists()


@pytest.mark.parametrize("what", ["x.safetensors", "manifest.json"])
def test_a_cache_that_is_damaged_is_thrown_away_and_a_result_is_not(tmp_path: Path, what: str) -> None:
    finished(tmp_path / "score")
    path = tmp_path / "score" / what
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)
    if what == "manifest.json":
        with pytest.raises(UserError, match="manifest"):
            stage(tmp_path / "score").is_done()
    assert path.read_bytes() == content
    assert not stage(tmp_path / "score", replace=True).is_done(claim=False)
    assert path.read_bytes() == content
    assert not stage(tmp_path / "score", replace=True).is_done()
    assert not path.exists()


def test_a_stage_folder_that_is_a_link_is_emptied_where_it_leads(tmp_path: Path) -> None:
    finished(tmp_path / "disk")
    (tmp_path / "disk" / "below").mkdir()
    (tmp_path / "score").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "out").symlink_to(tmp_path)
    empty(tmp_path / "score")
    assert (tmp_path / "score").is_symlink() and list((tmp_path / "disk").iterdir()) == []


def test_a_clock_that_is_set_back_gives_no_negative_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = stage(tmp_path / "score")
    made.begin()
    monkeypatch.setattr("time.time", lambda: 0.0)
    assert 0 <= made.finish({}, [])["seconds"] < 60


def test_queries_whose_files_are_gone_are_done_again_and_the_others_kept(tmp_path: Path) -> None:
    def of(queries: range) -> Stage:
        prints = {query: str(query) for query in queries}
        return stage(tmp_path / "u", queries=prints, file_of=lambda query: f"query_{query}")

    made = of(range(3))
    assert not made.is_done()
    made.begin()
    for query in range(3):
        (tmp_path / "u" / f"query_{query}").write_text("weights")
    made.finish({}, [tmp_path / "u" / f"query_{query}" for query in range(3)])
    assert of(range(3)).is_done()
    (tmp_path / "u" / "query_1").write_text("weig")
    assert of(range(2, 3)).is_done()
    again = of(range(3))
    assert not again.is_done()
    assert again.known_queries() == {0: "0", 2: "2"}
    assert np.array_equal(sorted(again.previous["outputs"]), ["query_0", "query_2"])


def test_who_waited_and_found_it_done_gives_the_lock_on(tmp_path: Path) -> None:
    """Else a third one, which waits for the same, would wait for the end of the second one's command."""
    folder, looked = tmp_path / "score", threading.Event()
    second = stage(folder)

    def first() -> None:
        made = stage(folder)
        assert not made.is_done()
        looked.set()
        time.sleep(0.2)  # the second one waits by now
        made.begin()
        made.finish({}, [])

    thread = threading.Thread(target=first)
    thread.start()
    looked.wait()
    assert second.is_done()
    thread.join()
    assert not locks.is_held_here(folder)


def test_what_is_being_added_to_is_no_damage_and_is_finished_again(tmp_path: Path) -> None:
    def of(queries: range, **arguments: Any) -> Stage:
        return stage(tmp_path / "score", queries={query: str(query) for query in queries}, **arguments)

    path = tmp_path / "score" / "x.safetensors"

    def fill(made: Stage, count: int) -> None:
        made.begin()
        if made.previous:
            made.keep_aside(path.name)
        write_tensors(path, {"x": torch.arange(count)})

    made = of(range(2))
    assert not made.is_done()
    fill(made, 2)
    made.finish({}, [path])
    adding = of(range(5))
    assert not adding.is_done()
    fill(adding, 5)  # and is killed
    locks.release_all()
    again = of(range(2))
    assert not again.is_done()
    assert again.known_queries() == {0: "0", 1: "1"}
    assert torch.equal(again.previous_tensors(path.name)["x"], torch.arange(2))
    fill(again, 2)
    again.finish({}, [path])
    assert of(range(2)).is_done() and not of(range(5)).is_done()


def test_overwrite_redoes_what_is_damaged_though_its_size_is_right(tmp_path: Path) -> None:
    path = finished(tmp_path / "score")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert stage(tmp_path / "score").is_done()  # found where it is read, with this advice
    assert not stage(tmp_path / "score", overwrite=True).is_done()


def test_queries_that_are_to_be_made_are_not_compared_with_those_that_another_process_made(tmp_path: Path) -> None:
    made = stage(tmp_path / "sample", queries={0: "first"})
    assert not made.is_done()
    made.begin()
    made.finish({}, [])
    assert stage(tmp_path / "sample", queries={0: None}).is_done()
    more = stage(tmp_path / "sample", queries={0: None, 1: None})
    assert not more.is_done() and more.known_queries() == {0: "first"}
    with pytest.raises(UserError, match="queries of query 0: got 'other'"):
        stage(tmp_path / "sample", queries={0: "other"}).is_done()
