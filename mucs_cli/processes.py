"""Several processes at one command, as ``torchrun`` or ``accelerate launch`` starts them.

All of them run the same stage; what is here keeps them in step. Process 0 decides, writes and speaks, the others
compute. They tell each other JSON, through the launcher's key-value store, and send each other tensors.

Who waits looks at the store again and again instead of blocking in it: so a waiting process can be interrupted, learns
that another one has failed, and may wait for hours.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from mucs_cli.errors import UserError

if TYPE_CHECKING:  # torch takes seconds to import; `mucs --help` does without
    from torch import Tensor
    from torch.distributed import Store  # type: ignore[attr-defined]  # torch does not say that it exports it

T = TypeVar("T")
V = TypeVar("V")

EXCHANGE = timedelta(minutes=10)
"""How long an exchange of tensors that all processes have come to may take."""
LONGEST_PAUSE = 0.05
"""Seconds between two looks at the store."""
FAILED = "failed"
"""The key of the store that says that a process has failed, and has said why."""
MOST_DIMENSIONS = 4


class World:
    """The processes of this command, as they talk through the launcher's store.

    All methods raise Abandoned where another process has failed and has said why, and UserError where the store cannot
    be reached any more.
    """

    def __init__(self, store: "Store"):
        self.store = store
        self.number = 0
        """How often they have been in step."""

    def next_key(self, what: str) -> str:
        """A key that all processes get alike, as they are in step."""
        self.number += 1
        return f"{what}/{self.number}"

    def tell(self, key: str, value: Any) -> None:
        """Lets the others know a JSON value."""
        text = json.dumps(value)
        with connected():
            self.store.set(key, text)

    def is_told(self, key: str) -> bool:
        with connected():
            return self.store.check([key])

    def told(self, key: str) -> Any:
        """What was told, or will be."""
        pause = 0.0005
        while not self.is_told(key):
            if has_failed():
                raise Abandoned
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        with connected():
            return json.loads(self.store.get(key))

    def count_up(self, key: str) -> int:
        """How many processes have come to this before, or this one has."""
        with connected():
            return self.store.add(key, 1) - 1


@dataclass(frozen=True)
class View:
    """How many processes the code that is running now is to see, and which of them it is in."""

    count: int
    rank: int


_world: World | None = None
_view = View(1, 0)


class Abandoned(BaseException):
    """Ends a process after another one has failed and said why."""


# --- who takes part --------------------------------------------------------------------------------------------------


def launched() -> int:
    """How many processes the launcher has started.

    Raises:
        UserError: its environment variables cannot be.
    """
    text = os.environ.get("WORLD_SIZE", "1")
    if not (text.isdecimal() and int(text) > 0):
        raise UserError("WORLD_SIZE", f"got {text!r}; expected how many processes there are. Start mucs with torchrun.")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if int(text) > 1 and missing:
        raise UserError(
            missing[0], f"is not set, with WORLD_SIZE={text}. Start mucs with torchrun, or unset WORLD_SIZE."
        )
    return int(text)


def speaks() -> bool:
    """Whether this process logs and prints: the first one does."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def start() -> bool:
    """Joins the other processes; does nothing where there are none, or where they were joined before.

    Returns:
        whether they were joined now.
    Raises:
        UserError: they cannot be reached.
    """
    global _world, _view
    if launched() == 1 or _world is not None:
        return False
    import torch
    import torch.distributed as dist
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # torch does not say that it exports it
    from torch.distributed.rendezvous import rendezvous

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        store, rank, count = next(rendezvous("env://"))
        of_tensors = PrefixStore("tensors", store)
        dist.init_process_group(backend, store=of_tensors, rank=rank, world_size=count, timeout=EXCHANGE)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            "WORLD_SIZE", f"got {launched()}, but the processes cannot reach each other ({error}). Start all of them."
        ) from error
    _world, _view = World(PrefixStore("mucs", store)), View(count, rank)
    return True


def stop() -> None:
    """Takes leave of the others, once all have come to the end."""
    global _world, _view
    if _world is None:
        return
    import torch.distributed as dist

    meet()
    dist.destroy_process_group()
    _world, _view = None, View(1, 0)


def count() -> int:
    """How many processes share the work; 1 for code that runs in one of them alone."""
    return _view.count


def rank() -> int:
    """Which of them this is, from 0."""
    return _view.rank


def is_first() -> bool:
    """Whether this process writes files."""
    return _view.rank == 0


@contextmanager
def seeing(view: View) -> Iterator[None]:
    global _view
    before, _view = _view, view
    try:
        yield
    finally:
        _view = before


def alone() -> Any:
    """A context in which this process works as if there were no others, and writes files."""
    return seeing(View(1, 0))


def part_of(length: int) -> slice:
    """This process's part of so many rows: all parts together are all rows, in order, and differ by one row at most."""
    return slice(length * _view.rank // _view.count, length * (_view.rank + 1) // _view.count)


# --- failures --------------------------------------------------------------------------------------------------------


def claim_failure() -> bool:
    """Tells the others that this process has failed.

    Returns:
        whether it is the one to say why: the first to fail; the first process where they have not been joined.
    """
    if _world is None:
        return speaks()
    try:
        return bool(_world.store.add(FAILED, 1) == 1)
    except RuntimeError:  # the launcher is gone, and with it its store
        return speaks()


def has_failed() -> bool:
    """Whether another process has failed and has said why."""
    try:
        return _world is not None and _world.store.check([FAILED])
    except RuntimeError:
        return False


@contextmanager
def connected() -> Iterator[None]:
    """Around whatever needs the other processes, one of which may have ended.

    Raises:
        Abandoned: one has, and has said why.
        UserError: one has not.
    """
    try:
        yield
    except RuntimeError as error:
        if has_failed():
            raise Abandoned from error
        raise UserError(
            f"process {_view.rank}",
            f"got no answer from another process of this command, which has ended or cannot be reached ({error}). "
            "What is finished is kept: run the same command again.",
        ) from error


# --- in step ---------------------------------------------------------------------------------------------------------


def meet() -> None:
    """Waits until all processes have come here."""
    if _world is None or _view.count == 1:
        return
    key = _world.next_key("met")
    if _world.count_up(key) == _view.count - 1:
        _world.tell(f"{key}/all", True)
    _world.told(f"{key}/all")


def on_first(compute: Callable[[], T]) -> T:
    """What the first process, working alone, computes; the others wait for it.

    Args:
        compute: gives JSON values, of which tuples come back as lists.
    """
    if _world is None or _view.count == 1:
        return compute()
    key = _world.next_key("value")
    if is_first():
        with alone():
            value = compute()
        _world.tell(key, value)
    found: T = _world.told(key)
    return found


def first_then_all(compute: Callable[[], T]) -> T:
    """What every process computes for itself: the first one at first, the others once it is done, without writing.

    For what is read from files that the first process makes if need be.
    """
    if _view.count == 1:
        return compute()
    if is_first():
        with alone():
            value = compute()
        on_first(lambda: None)
        return value
    on_first(lambda: None)
    with seeing(View(1, _view.rank)):
        return compute()


def share_out(items: Sequence[T], do: Callable[[T], Iterable[V]]) -> Iterator[tuple[T, V]]:
    """Every item is done by one process, working alone: by whichever is free.

    Args:
        items: the same in all processes.
        do: gives an item's results, JSON values; the first process is told its own as they come, and those of another
            process once the item is done.
    Yields:
        item and result, on the first process only.
    """
    world = _world
    if world is None or _view.count == 1:
        for item in items:
            for result in do(item):
                yield item, result
        return
    key = world.next_key("share")
    others = dict(enumerate(items))

    def told_by_others(begun: int) -> Iterator[tuple[T, V]]:
        for number in [number for number in others if number < begun and world.is_told(f"{key}/{number}")]:
            item = others.pop(number)
            for result in world.told(f"{key}/{number}"):
                yield item, result

    while (number := world.count_up(key)) < len(items):
        if is_first():
            item = others.pop(number)
            for result in each_alone(do, item):
                yield item, result
            yield from told_by_others(number)
        else:
            with alone():
                results = list(do(items[number]))
            world.tell(f"{key}/{number}", results)
    while is_first() and others:
        world.told(f"{key}/{next(iter(others))}")
        yield from told_by_others(len(items))


def each_alone(do: Callable[[T], Iterable[V]], item: T) -> Iterator[V]:
    """An item's results, each of which is made by a process working alone; what happens in between is not."""
    with alone():
        iterator, end = iter(do(item)), object()
    while True:
        with alone():
            result: Any = next(iterator, end)
        if result is end:
            return
        yield result


# --- tensors ---------------------------------------------------------------------------------------------------------


def is_true_anywhere(value: bool) -> bool:
    """Whether it is true in any process."""
    if _view.count == 1:
        return value
    import torch
    import torch.distributed as dist

    found = torch.tensor(int(value))
    meet()
    with connected():
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


def gather(tensor: "Tensor | None") -> "list[Tensor | None]":
    """Every process's tensor, by rank, on the first process; nothing on the others.

    Args:
        tensor: float32, on the CPU, of any shape up to four dimensions, not empty; or None.
    """
    if _view.count == 1:
        return [tensor]
    import torch
    import torch.distributed as dist

    shape = torch.full((MOST_DIMENSIONS,), -1)
    if tensor is not None:
        assert tensor.dtype == torch.float32 and tensor.numel() and tensor.dim() <= MOST_DIMENSIONS
        shape[: tensor.dim()] = torch.tensor(tensor.shape)
    shapes = [torch.empty_like(shape) for _ in range(_view.count)]
    found = [tensor]
    meet()
    with connected():
        dist.all_gather(shapes, shape)
        if not is_first():
            if tensor is not None:
                dist.send(tensor.contiguous(), dst=0)
            return []
        for source, sizes in enumerate(shapes[1:], start=1):
            dimensions = [size for size in sizes.tolist() if size >= 0]
            received = torch.empty(dimensions) if dimensions else None
            if received is not None:
                dist.recv(received, src=source)
            found.append(received)
    return found


def sum_up(tensor: "Tensor") -> None:
    """Replaces a tensor by its sum over all processes, which have the same bits of it then."""
    if _view.count == 1:
        return
    import torch.distributed as dist

    with connected():
        dist.all_reduce(tensor)


def tensors_of_first(tensors: "Mapping[str, Tensor]") -> "Mapping[str, Tensor]":
    """The first process's tensors, in all of them.

    Args:
        tensors: by name; of no account in other processes.
    """
    if _view.count == 1:
        return tensors
    import torch
    import torch.distributed as dist

    described: dict[str, Any] = on_first(
        lambda: {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()}
    )
    found: dict[str, Tensor] = {}
    meet()
    with connected():
        for name, (dtype, shape) in described.items():
            own = tensors[name].detach().cpu().contiguous() if is_first() else None
            found[name] = torch.empty(shape, dtype=getattr(torch, dtype)) if own is None else own
            if found[name].numel():
                dist.broadcast(found[name], src=0)
    return found
