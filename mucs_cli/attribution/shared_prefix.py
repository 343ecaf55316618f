"""Sharing the frozen part of a network among models that differ from each other in late modules only.

The prefix is what a forward pass does before the first use of a parameter in which the models differ: up to there, all
do the same on the same input. ``find_prefix`` traces one forward pass and lists the calls of modules in the prefix.
``SharedPrefix`` computes the outermost complete ones once and afterwards returns their outputs; the rest of the network
runs as ever, so that results have the bits of the full forward.

What a network's forward must be for this: a function of its input and its parameters. Calls in another order than the
traced one, several calls of a module, and writes into a tensor in place are allowed for.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

Forward = Callable[..., Any]


@dataclass
class PrefixCall:
    """A call of a module that begins in the prefix.

    Args:
        module: what is called.
        is_complete: it also ends there, so that its output is shared; else it runs, and its children's calls follow.
        is_read: for each leaf of its output, whether anything reads it but modules whose outputs are shared themselves.
    """

    module: nn.Module
    is_complete: bool = False
    is_read: list[bool] = field(default_factory=list)


def find_prefix(network: nn.Module, changed: Iterable[str], run: Callable[[], object]) -> list[PrefixCall]:
    """The calls in the prefix, in their order, of the first forward pass that ``run`` makes.

    Args:
        network: a network in evaluation mode.
        changed: names of the parameters in which the models differ.
        run: calls the network; a few images are enough.
    Returns:
        Nothing where no module's output can be shared.
    """
    trace = _Trace(network, changed)
    with torch.no_grad(), _intercepted(network, trace.call), trace:
        run()
    return trace.calls if any(call.is_complete for call in trace.calls) else []


class _OutOfOrderError(Exception):
    """The network calls its modules in another order than the traced one."""


class SharedPrefix:
    """Outputs of the prefix for one input, kept from the model that first computes them for those that follow.

    Kept is what code outside the prefix's own modules reads: of a chain of blocks the last output, of a U-Net that
    differs in its last blocks their skips.

    Args:
        calls: what ``find_prefix`` gave.
    """

    def __init__(self, calls: list[PrefixCall]):
        self._calls = calls
        self._kept: dict[int, _Output] = {}
        self._position = 0
        self._is_computing = False

    def forget(self) -> None:
        """Drops what is kept: to be called before another input."""
        self._kept.clear()

    def run(self, compute: Callable[[], Tensor]) -> Tensor:
        """``compute()``, which passes the input through one model's network.

        In full, for good, once the calls are not those of the trace.
        """
        if any(output.is_overwritten() for output in self._kept.values()):
            self.forget()
        self._position = 0
        try:
            result = compute()
            if self._position == len(self._calls):
                return result
        except _OutOfOrderError:
            pass
        self._calls = []
        self.forget()
        return self.run(compute)

    def call(self, module: nn.Module, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        """The module's output: the kept one, or else computed, and kept where it is of the prefix."""
        position = self._position
        if self._is_computing or position == len(self._calls):
            return forward(*args, **kwargs)
        expected = self._calls[position]
        if expected.module is not module:
            raise _OutOfOrderError
        self._position += 1
        if position in self._kept:
            return self._kept[position].value()
        if not expected.is_complete:
            return forward(*args, **kwargs)
        self._is_computing = True
        try:
            output = forward(*args, **kwargs)
        finally:
            self._is_computing = False
        if len(tree_leaves(output)) != len(expected.is_read):
            raise _OutOfOrderError
        self._kept[position] = _Output(output, expected.is_read)
        return output


@contextmanager
def shared_prefix(network: nn.Module, calls: list[PrefixCall]) -> Iterator[SharedPrefix]:
    """Lets the network's forward passes share their prefix for the length of the context."""
    prefix = SharedPrefix(calls)
    with _intercepted(network if calls else nn.Module(), prefix.call):
        yield prefix


class _Output:
    """A module's output without the leaves that nothing reads, in whose place stands one NaN, expanded."""

    def __init__(self, output: Any, is_read: Sequence[bool]):
        self._spec: TreeSpec
        leaves, self._spec = tree_flatten(output)
        self._leaves = [
            leaf if read or not _is_real(leaf) else leaf.new_full((), torch.nan).expand(leaf.shape)
            for leaf, read in zip(leaves, is_read, strict=True)
        ]
        self._versions = _versions(self._leaves)

    def is_overwritten(self) -> bool:
        return _versions(self._leaves) != self._versions

    def value(self) -> Any:
        """In containers of its own: a caller may empty a list that it was given."""
        return tree_unflatten(self._leaves, self._spec)


Leaf = tuple[PrefixCall, int]
"""A leaf of a call's output, by its number."""


class _Trace(TorchDispatchMode):
    """Watches one forward pass: the calls of modules, and which memory each operation reads."""

    def __init__(self, network: nn.Module, changed: Iterable[str]):
        super().__init__()
        known = dict(network.named_parameters())
        parameters = {known[name] for name in changed}
        self._changed = {StorageWeakRef(parameter.untyped_storage()) for parameter in parameters}
        self._owners = {m for m in network.modules() if not parameters.isdisjoint(m.parameters(recurse=False))}
        self.calls: list[PrefixCall] = []
        self._reads: list[list[Leaf]] = []
        """For each running call, the outputs that it has read."""
        self._outputs: dict[StorageWeakRef, list[Leaf]] = {}
        """By their memory, held weakly: what dies before the prefix ends is not read after it."""
        self._has_ended = False

    def call(self, module: nn.Module, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        if module in self._owners:  # its kernel might be one that no operation of torch shows
            self._end()
        if self._has_ended:
            return forward(*args, **kwargs)
        start, inputs = len(self.calls), tree_leaves((args, kwargs))
        versions = _versions(inputs)
        self.calls.append(PrefixCall(module))
        self._reads.append([])
        output = forward(*args, **kwargs)
        if self._has_ended:
            return output
        reads, leaves, after = self._reads.pop(), tree_leaves(output), tree_leaves((args, kwargs))
        is_untouched = list(map(id, after)) == list(map(id, inputs)) and _versions(inputs) == versions
        if is_untouched and all(_is_plain(leaf) for leaf in (*inputs, *leaves)):
            complete = PrefixCall(module, True, [False] * len(leaves))
            self.calls[start:] = [complete]
            for index, leaf in enumerate(leaves):
                if isinstance(leaf, Tensor):
                    self._outputs.setdefault(StorageWeakRef(leaf.untyped_storage()), []).append((complete, index))
        elif self._reads:  # it runs for every model, within a call that may yet be complete
            self._reads[-1] += reads
        else:
            _mark(reads)
        if not self._reads:
            self._end()
        return output

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._reads and not self._has_ended:
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                    memory = StorageWeakRef(leaf.untyped_storage())
                    if memory in self._changed:
                        self._end()
                        break
                    self._reads[-1] += self._outputs.get(memory, [])
        return func(*args, **(kwargs or {}))

    def _end(self) -> None:
        """Marks what running calls have read, and what is still there to be read later."""
        if self._has_ended:
            return
        self._has_ended = True
        for reads in (*self._reads, *(leaves for memory, leaves in self._outputs.items() if not memory.expired())):
            _mark(reads)


def _mark(leaves: Iterable[Leaf]) -> None:
    for call, index in leaves:
        call.is_read[index] = True


@contextmanager
def _intercepted(network: nn.Module, call: Callable[..., Any]) -> Iterator[None]:
    """Makes every module's forward ``call(module, forward, *args, **kwargs)`` for the length of the context."""

    def interceptor(module: nn.Module, forward: Forward) -> Forward:
        @wraps(forward)
        def intercepted(*args: Any, **kwargs: Any) -> Any:
            return call(module, forward, *args, **kwargs)

        return intercepted

    modules = list(network.modules())
    before = [vars(module).get("forward") for module in modules]  # other libraries put a forward there, too
    try:
        for module in modules:
            vars(module)["forward"] = interceptor(module, module.forward)
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            if forward is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = forward


def _is_plain(leaf: Any) -> bool:
    """Whether all of it is known: an object of another class may hold tensors, or be written into."""
    if isinstance(leaf, Tensor):
        return leaf.layout == torch.strided
    return leaf is None or isinstance(leaf, bool | int | float | str | torch.dtype | torch.device)


def _is_real(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _versions(leaves: Iterable[Any]) -> list[int]:
    """How often each tensor was written into; inference tensors are not counted, nor can they be written into here."""
    return [leaf._version for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_inference()]
