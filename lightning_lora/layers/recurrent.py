"""Adapters on recurrent layers: one kernel reads all of their weights."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from lightning_lora.layers.seam import Reader


class AdaptedCell(Reader):
    """``nn.RNNCell``, ``nn.LSTMCell``, ``nn.GRUCell``: the matrices of the input and of the hidden state."""

    adapts: ClassVar[tuple[type[nn.Module], ...]] = (nn.RNNCell, nn.LSTMCell, nn.GRUCell)

    @staticmethod
    def matrices(module: nn.Module) -> list[str]:
        """Return the names of all weights."""
        return [name for name in module._parameters if name.startswith("weight_")]

    @staticmethod
    def reads(module: nn.Module) -> list[tuple[nn.Module, str]]:
        """Return the weights."""
        return [(module, name) for name in AdaptedCell.matrices(module)]


class AdaptedRecurrent(AdaptedCell):
    """``nn.RNN``, ``nn.LSTM``, ``nn.GRU``: the kernel takes the weights as one list."""

    adapts = (nn.RNN, nn.LSTM, nn.GRU)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the plain forward, then let go of the adapted weights."""
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._update_flat_weights()

    def _update_flat_weights(self) -> None:
        """Take the weights as they are now; PyTorch would also pack them, which writes to them on a GPU."""
        self._flat_weights = [getattr(self, name) for name in self._flat_weights_names]  # type: ignore[union-attr]
