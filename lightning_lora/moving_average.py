"""A moving average of the parameters that are trained, kept beside the model and put into it by turns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from lightning_lora.sites import clean


class MovingAverage:
    """Exponential moving averages of every parameter that requires a gradient: ``decay * average + (1 - decay) * now``.

    Averages are fp32, or wider where the parameter is: in half precision small updates would be rounded away.

    Args:
        decay: Share of the average that each update keeps.

    Attributes:
        values: The averages by parameter name; empty before the first update, which takes the values as they are.
        set_aside: What the parameters hold otherwise, while the averages are in the model.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.values: dict[str, Tensor] = {}
        self.set_aside: dict[str, Tensor] = {}

    def update(self, model: nn.Module) -> None:
        """Move the averages towards the parameters; one that was not trained before starts as it is."""
        averages: list[Tensor] = []
        current: list[Tensor] = []
        for name, parameter in model.named_parameters():
            if name in self.values:
                averages.append(self.values[name])
                current.append(parameter.detach().to(self.values[name].dtype))
            elif parameter.requires_grad:
                self.values[name] = _wide_copy(parameter)
        if averages:  # by interpolation, which leaves an average alone that already equals its parameter
            get_ema_multi_avg_fn(self.decay)(averages, current, None)  # type: ignore[no-untyped-call]

    def put_in(self, model: nn.Module) -> None:
        """Put the averages into the model and set aside what was there; nothing if they are in it already."""
        if not self.set_aside:
            parameters = self._averaged(model)
            self.set_aside = {name: parameter.detach().clone() for name, parameter in parameters.items()}
            _write(parameters, self.values)

    def take_out(self, model: nn.Module) -> None:
        """Give the model back, bit for bit, what was set aside."""
        _write(self._averaged(model), self.set_aside)
        self.set_aside = {}

    def is_in(self, model: nn.Module) -> bool:
        """Tell whether the model's values are the averages."""
        parameters = self._averaged(model)
        return parameters.keys() == self.values.keys() and all(
            torch.equal(parameter, self.values[name].to(parameter)) for name, parameter in parameters.items()
        )

    def follow(self, model: nn.Module) -> None:
        """Go to the devices that the parameters are on."""
        for name, parameter in self._averaged(model).items():
            for tensors in (self.values, self.set_aside):
                if name in tensors:
                    tensors[name] = tensors[name].to(parameter.device)

    def averaged_state(self, model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
        """Return a state dict of the model with the averages in it, whichever values the model holds now."""
        if not self.set_aside:
            averages = {p: self.values[name].to(p.dtype) for name, p in self._averaged(model).items()}
            for name, parameter in model.named_parameters(remove_duplicate=False):
                if parameter in averages and name in state:
                    state[name] = averages[parameter]
        return state

    def other_state(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return what `averaged_state` does not hold, by parameter name.

        Returns:
            What the parameters hold while the averages are not in the model, and averages that their type would round.
        """
        current: dict[str, Tensor] = {}
        wide: dict[str, Tensor] = {}
        for name, parameter in self._averaged(model).items():
            current[name] = self.set_aside.get(name, parameter.detach())
            if self.values[name].dtype != parameter.dtype:
                wide[name] = self.values[name]
        return current, wide

    def restore(self, model: nn.Module, current: Mapping[str, Tensor], wide: Mapping[str, Tensor]) -> None:
        """Go on from a saved state.

        Args:
            model: The model, with the `averaged_state` loaded into it; it gets the current values.
            current: First part of the `other_state`.
            wide: Second part of it.
        """
        live = {clean(name): name for name, _ in model.named_parameters()}  # where only one of the runs was compiled
        current = {live[clean(name)]: tensor for name, tensor in current.items() if clean(name) in live}
        wide = {live[clean(name)]: tensor for name, tensor in wide.items() if clean(name) in live}
        parameters = {name: parameter for name, parameter in model.named_parameters() if name in current}
        self.values = {name: _wide_copy(wide.get(name, parameter)) for name, parameter in parameters.items()}
        self.set_aside = {}
        _write(parameters, current)
        self.follow(model)

    def _averaged(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in model.named_parameters() if name in self.values}


def _wide_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)


@torch.no_grad()
def _write(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        if name in tensors:
            parameter.copy_(tensors[name])
