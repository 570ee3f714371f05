"""Models with random weights for the benchmarks: each kind with what is adapted in it and what it is given.

Each is differentiated with respect to the first of its inputs (embeddings, pixels), so that the gradient passes through
all of its layers as it would if something below them were trained too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 1000
Batch = dict[str, Any]


@dataclass(frozen=True)
class Base:
    """A kind of model.

    Attributes:
        build: Makes one with random weights.
        targets: The layers that are adapted, by the last parts of their names.
        draw: Makes inputs for a batch and a number of tokens (pixels, patches) of each; the first one is continuous.
        peft: What PEFT has to be told besides.
    """

    build: Callable[[], nn.Module]
    targets: tuple[str, ...]
    draw: Callable[[int, int], Batch]
    peft: dict[str, Any] = field(default_factory=dict)

    def names(self, model: nn.Module) -> list[str]:
        """Return the names of the adapted layers."""
        return [name for name, _ in model.named_modules() if f".{name}".endswith(tuple(f".{t}" for t in self.targets))]


def loss_of(output: Any) -> Tensor:
    """Return the loss of a transformers model, or of a tensor the mean square."""
    return output.float().square().mean() if isinstance(output, Tensor) else output.loss


def llama(layers: int, hidden: int, inner: int, heads: int, key_heads: int, tied: bool = False) -> Base:
    """Return a model of Llama's kind."""

    def build() -> nn.Module:
        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_heads,
            tie_word_embeddings=tied,
            max_position_embeddings=8192,
            use_cache=False,
        )
        return transformers.LlamaForCausalLM(config)

    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return Base(build, targets, _embeddings(hidden))


def gpt2(layers: int, hidden: int, heads: int) -> Base:
    """Return a model of GPT-2's kind, whose linear layers are transformers' ``Conv1D``."""

    def build() -> nn.Module:
        rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=hidden, n_layer=layers, n_head=heads, use_cache=False, **rates
        )
        return transformers.GPT2LMHeadModel(config)

    return Base(build, ("c_attn", "c_proj", "c_fc"), _embeddings(hidden), {"fan_in_fan_out": True})


def bert(layers: int, hidden: int, heads: int) -> Base:
    """Return a model of BERT's kind."""

    def build() -> nn.Module:
        config = transformers.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        return transformers.BertForMaskedLM(config)

    targets = ("query", "key", "value", "intermediate.dense", "output.dense")
    return Base(build, targets, _embeddings(hidden))


def vit(layers: int, hidden: int, heads: int, patches: int) -> Base:
    """Return a model of ViT's kind for images of so many patches, a square number."""
    side = 4 * math.isqrt(patches)

    def build() -> nn.Module:
        config = transformers.ViTConfig(
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            image_size=side,
            patch_size=4,
            num_labels=10,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        return transformers.ViTForImageClassification(config)

    def draw(batch: int, tokens: int) -> Batch:
        return {"pixel_values": torch.randn(batch, 3, side, side), "labels": torch.arange(batch) % 10}

    return Base(build, ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"), draw)


def encoder(layers: int, hidden: int, heads: int) -> Base:
    """Return PyTorch's own encoder."""

    def build() -> nn.Module:
        layer = nn.TransformerEncoderLayer(hidden, heads, 4 * hidden, 0.0, batch_first=True, norm_first=True)
        return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    return Base(
        build,
        ("self_attn", "linear1", "linear2"),
        lambda batch, tokens: {"src": torch.randn(batch, tokens, hidden)},
    )


class Residual(nn.Module):
    """Two convolutions beside the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, channels), nn.GroupNorm(8, channels)
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv1(torch.relu(self.norm1(x)))
        return x + self.conv2(torch.relu(self.norm2(inner)))  # type: ignore[no-any-return]


def convolutions(layers: int, channels: int) -> Base:
    """Return residual blocks of 3 x 3 convolutions on square images, whose pixels are the tokens."""

    def draw(batch: int, tokens: int) -> Batch:
        side = math.isqrt(tokens)
        return {"input": torch.randn(batch, channels, side, side)}

    return Base(lambda: nn.Sequential(*(Residual(channels) for _ in range(layers))), ("conv1", "conv2"), draw)


def _embeddings(hidden: int) -> Callable[[int, int], Batch]:
    def draw(batch: int, tokens: int) -> Batch:
        labels = torch.randint(VOCABULARY, (batch, tokens))
        return {"inputs_embeds": torch.randn(batch, tokens, hidden), "labels": labels}

    return draw
