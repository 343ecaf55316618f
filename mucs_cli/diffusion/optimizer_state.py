"""The weights that an optimiser moves and what it remembers of them, as named tensors."""

from collections.abc import Mapping

import torch
from torch import Tensor

REMEMBERED = ("step", "exp_avg", "exp_avg_sq")
"""What Adam and AdamW keep of every parameter; plain SGD keeps nothing."""


def optimizer_state(parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """``weight.<name>``, and ``step.<name>``, ``exp_avg.<name>``, ``exp_avg_sq.<name>`` where there are any; no copies.

    Args:
        parameters: name -> what the optimiser moves.
        optimizer: theirs.
    """
    found = {}
    for name, parameter in parameters.items():
        found[f"weight.{name}"] = parameter.detach()
        remembered = optimizer.state.get(parameter, {})
        found |= {f"{key}.{name}": remembered[key] for key in REMEMBERED if key in remembered}
    return found


@torch.no_grad()
def load_optimizer_state(
    parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Goes on from what ``optimizer_state`` returned; the tensors are copied.

    Raises:
        KeyError: a weight is missing.
    """
    for name, parameter in parameters.items():
        parameter.copy_(tensors[f"weight.{name}"])
        remembered = {key: tensors[f"{key}.{name}"] for key in REMEMBERED if f"{key}.{name}" in tensors}
        if remembered:  # on the parameter's device, the step count too: a fused optimiser wants it there
            optimizer.state[parameter] = {k: v.to(parameter.device, copy=True) for k, v in remembered.items()}
