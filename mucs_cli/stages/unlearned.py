"""The unlearned models of one variant, on disk."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from mucs_cli.artifacts import REDO, read_tensors
from mucs_cli.errors import DamagedError, UserError
from mucs_cli.stage_folder import command_hint, require_manifest
from mucs_cli.tensor_forms import dtype_of


def query_file(folder: Path, query: int) -> Path:
    """The file of a query's unlearned model: the tensors that changed."""
    return folder / f"query_{query:04d}.safetensors"


class UnlearnedModels:
    """What ``mucs unlearn`` left in ``folder``.

    Args:
        folder: ``<run>/unlearn/<variant>``.
        network: the base model's, whose parameters they replace.
    Raises:
        UserError: it has not finished.
    """

    def __init__(self, folder: Path, network: nn.Module):
        self.folder = folder
        self.parameters = dict(network.named_parameters())
        self.manifest = require_manifest(folder, "unlearn")

    def check(self, model: str, queries: Mapping[int, str]) -> None:
        """Raises UserError where they come from another base model or other queries, or where a query has none.

        Args:
            model: the base model's fingerprint.
            queries: id -> fingerprint of the queries that are wanted.
        """
        path, known = self.folder / "manifest.json", self.manifest["queries"]
        missing = [query for query in queries if str(query) not in known]
        if missing:
            raise UserError(
                str(path),
                f"has no unlearned model of query {missing[0]} ({len(missing)} of {len(queries)} are missing). Run "
                f"{command_hint(self.folder, 'unlearn')} first, or choose others by queries.index.",
            )
        pairs = [("model", self.manifest["inputs"]["model"], model)]
        pairs += [(f"query {query}", known[str(query)], mine) for query, mine in queries.items()]
        for name, recorded, mine in pairs:
            if recorded != mine:
                raise UserError(
                    str(path),
                    f"got unlearned models of {name} {str(recorded)[:16]}; the run now has {mine[:16]}. "
                    "Rerun mucs unlearn with overwrite=true.",
                )

    def fingerprints(self, queries: Sequence[int]) -> dict[int, str]:
        """id -> SHA-256 of each query's file."""
        return {query: self._output(query)["sha256"] for query in queries}

    def tensors(self, query: int, device: torch.device) -> dict[str, Tensor]:
        """The tensors in which a query's unlearned model differs from the base model.

        Copies: as they lie in the file they are not aligned, for which matrix kernels may round otherwise than for the
        base model's, so that equal weights would give unequal losses.
        """
        path = query_file(self.folder, query)
        try:
            loaded = read_tensors(path, self._output(query)["sha256"])
        except DamagedError as error:
            again = f"Delete it and run {command_hint(self.folder, 'unlearn')} again, with what was typed for it: only "
            raise DamagedError(
                error.subject, error.message.replace(REDO, f"{again}this query is unlearned anew.")
            ) from error
        for name, tensor in loaded.items():
            mine = self.parameters.get(name)
            if mine is None or (mine.shape, mine.dtype) != (tensor.shape, tensor.dtype):
                raise DamagedError(
                    str(path),
                    f"got {name!r} of {dtype_of(tensor)} {list(tensor.shape)}, which the base model has not. "
                    "Rerun mucs unlearn with overwrite=true.",
                )
        return {name: tensor.to(device, copy=True) for name, tensor in loaded.items()}

    def per_pass(self, queries: Sequence[int], budget: float) -> int:
        """How many of the models fit into ``budget`` GiB, at least one."""
        largest = max(int(self._output(query)["bytes"]) for query in queries)
        return max(1, min(len(queries), int(budget * 2**30 / max(largest, 1))))

    def _output(self, query: int) -> dict[str, str]:
        record: dict[str, str] = self.manifest["outputs"][query_file(self.folder, query).name]
        return record
