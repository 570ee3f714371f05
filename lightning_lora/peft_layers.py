"""How PEFT stores an adapter's factors, on each kind of layer where it computes what this library does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lightning_lora.adapter import SHARED
from lightning_lora.layers import kind_in_use, kind_of
from lightning_lora.layers.attention import AdaptedMultiheadAttention
from lightning_lora.layers.convolution import AdaptedConvolution
from lightning_lora.layers.embedding import AdaptedEmbedding
from lightning_lora.layers.linear import AdaptedLinear
from lightning_lora.layers.seam import AdaptedLayer, plain_class
from lightning_lora.layout import Layout
from lightning_lora.method import Method
from lightning_lora.sites import join


class Form:
    """The names and shapes of an adapter's factors in a file: here those of a linear layer, stored as they are.

    The forms are those of LoRA's two factors and of DoRA's magnitudes. A method with other factors adds their names to
    ``ends``, or has forms of its own beside these; nothing else looks at the names in a file.

    Attributes:
        ends: What follows the layer's name in a tensor's name, by the adapter's own name of the factor; of a shared
            one it is the whole name.
    """

    ends: ClassVar[Mapping[str, str]] = {
        "lora_A": "lora_A.weight",
        "lora_B": "lora_B.weight",
        "magnitude": "lora_magnitude_vector",
    }

    @classmethod
    def end(cls, factor: str) -> str:
        """Return what follows the layer's name in the name of a factor's tensor."""
        return cls.ends[factor]

    @staticmethod
    def stored(factor: str, tensor: Tensor, size: tuple[int, ...]) -> Tensor:
        """Return a factor as it lies in the file.

        Args:
            factor: The adapter's name of it.
            tensor: As the adapter has it.
            size: The size of the weight that is changed.
        """
        return tensor

    @staticmethod
    def live(factor: str, tensor: Tensor, r: int, layout: Layout | None) -> Tensor:
        """Return a factor as the adapter has it.

        Args:
            factor: The adapter's name of it.
            tensor: As it lies in the file.
            r: The adapter's rank.
            layout: How the changed weight lies, where that is known.
        """
        return tensor

    @classmethod
    def written(cls, method: Method, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return an adapter's parameters as those that go into the file.

        Args:
            method: The adapter's.
            factors: All of one adapter, by name.
        """
        return method.to_peft(factors)

    @classmethod
    def read(cls, method: Method, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what ``written`` was given, from what it returned."""
        return method.of_peft(factors)


class OwnForm(Form):
    """Any factor under its own name and in its own shape: a file that no other library reads."""

    @classmethod
    def end(cls, factor: str) -> str:
        """Return the factor's own name."""
        return factor

    @classmethod
    def written(cls, method: Method, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return them as they are."""
        return dict(factors)

    @classmethod
    def read(cls, method: Method, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return them as they are."""
        return dict(factors)


class EmbeddingForm(Form):
    """Embeddings: PEFT calls the factor that is looked up A, and stores both transposed."""

    ends: ClassVar[Mapping[str, str]] = {
        "lora_A": "lora_embedding_B",
        "lora_B": "lora_embedding_A",
        "magnitude": "lora_magnitude_vector",
    }

    @staticmethod
    def stored(factor: str, tensor: Tensor, size: tuple[int, ...]) -> Tensor:
        """Return (r, vocabulary) of ``lora_B``, (dim, r) of ``lora_A``, (dim,) of ``magnitude``."""
        return tensor if factor == "magnitude" else tensor.transpose(0, 1)

    @staticmethod
    def live(factor: str, tensor: Tensor, r: int, layout: Layout | None) -> Tensor:
        """Return (vocabulary, r), (r, dim) or (dim,)."""
        return tensor if factor == "magnitude" else tensor.transpose(0, 1)


class ConvolutionForm(Form):
    r"""Convolutions: A is a kernel (r, in, \*k), B one of size 1 (out, r, 1, ...), a magnitude (1, out, 1, ...)."""

    @staticmethod
    def stored(factor: str, tensor: Tensor, size: tuple[int, ...]) -> Tensor:
        """Return the factor as a kernel, or magnitudes as they fit the layer's output."""
        if factor == "magnitude":
            return tensor.reshape(1, -1, *[1] * len(size[2:]))
        kernel = size[1:] if factor == "lora_A" else (tensor.shape[1], *[1] * len(size[2:]))
        return tensor.reshape(tensor.shape[0], *kernel)

    @staticmethod
    def live(factor: str, tensor: Tensor, r: int, layout: Layout | None) -> Tensor:
        """Return (r, in * k), (out, r) or (out,)."""
        return tensor.flatten() if factor == "magnitude" else tensor.flatten(1)


class ParameterForm(Form):
    """What ``target_parameters`` means: a matrix, or a stack of n whose factors lie side by side.

    A is (n * r, in), matrix by matrix; B is (out, r * n), column by column of all matrices.
    """

    @staticmethod
    def stored(factor: str, tensor: Tensor, size: tuple[int, ...]) -> Tensor:
        """Return the factors of a stack as one matrix."""
        if tensor.dim() == 2:
            return tensor
        return tensor.flatten(0, 1) if factor == "lora_A" else tensor.permute(1, 2, 0).flatten(1)

    @staticmethod
    def live(factor: str, tensor: Tensor, r: int, layout: Layout | None) -> Tensor:
        """Return (n, r, in) or (n, out, r), without n where it is no stack."""
        stacked = tensor.shape[0 if factor == "lora_A" else 1] != r if layout is None else layout.stacked
        if not stacked:
            return tensor
        if factor == "lora_A":
            return tensor.reshape(-1, r, tensor.shape[1])
        return tensor.reshape(tensor.shape[0], r, -1).permute(2, 0, 1)


class TripletForm(Form):
    """AdaLoRA's three factors of a linear layer, as they are and under their own names."""

    ends: ClassVar[Mapping[str, str]] = {"lora_A": "lora_A", "lora_E": "lora_E", "lora_B": "lora_B"}


class VectorForm(Form):
    """VeRA's vectors of a linear layer, and the projections that all layers share, which have names without a layer."""

    ends: ClassVar[Mapping[str, str]] = {
        "vera_lambda_d": "vera_lambda_d",
        "vera_lambda_b": "vera_lambda_b",
        "shared.vera_A": "base_model.vera_A",
        "shared.vera_B": "base_model.vera_B",
    }


class HadamardForm(Form):
    """HiRA's two factors of a linear layer, under their own names."""

    ends: ClassVar[Mapping[str, str]] = {"lora_A": "hira_A", "lora_B": "hira_B"}


class HadamardEmbeddingForm(EmbeddingForm):
    """HiRA's two factors of an embedding, swapped and transposed as LoRA's."""

    ends: ClassVar[Mapping[str, str]] = {"lora_A": "hira_embedding_B", "lora_B": "hira_embedding_A"}


class HadamardConvolutionForm(ConvolutionForm):
    """HiRA's two factors of a convolution, as kernels."""

    ends: ClassVar[Mapping[str, str]] = HadamardForm.ends


LINEAR_FORMS = (Form, TripletForm, VectorForm, HadamardForm)
_ON_LINEAR_LAYERS_ONLY = {"ADALORA": ("AdaLoRA", TripletForm), "VERA": ("VeRA", VectorForm)}
FORMS: dict[str, type[Form]] = {
    "linear": Form,
    "triplets": TripletForm,
    "vectors": VectorForm,
    "hadamard": HadamardForm,
    "hadamard embedding": HadamardEmbeddingForm,
    "hadamard convolution": HadamardConvolutionForm,
    "embedding": EmbeddingForm,
    "convolution": ConvolutionForm,
    "parameter": ParameterForm,
}


class Stored(NamedTuple):
    """Where the factors of one site lie in a file.

    Attributes:
        owner: What the names of their tensors begin with.
        form: How they go on, and the shapes.
    """

    owner: str
    form: type[Form]

    def key(self, factor: str) -> str:
        """Return the name of a factor's tensor, which for a shared one is the same at every site."""
        return join("" if factor.startswith(SHARED) else self.owner, self.form.end(factor))


def layer_form(module: nn.Module, parameter: str, peft_type: str = "LORA") -> tuple[type[Form] | None, str]:
    """Return how PEFT stores an adapter that ``target_modules`` puts on a layer.

    Args:
        module: The layer, with or without adapters.
        parameter: Which of its parameters.
        peft_type: The type of the adapter in PEFT.

    Returns:
        The form; or None, and in what PEFT differs from this library there.
    """
    kind, plain = kind_in_use(module), plain_class(module)
    if peft_type in _ON_LINEAR_LAYERS_ONLY:
        name, form = _ON_LINEAR_LAYERS_ONLY[peft_type]
        return (form, "") if issubclass(kind, AdaptedLinear) else (None, f"PEFT has {name} on linear layers only")
    if peft_type == "HIRA":
        return _hadamard_form(module, kind)
    if issubclass(kind, AdaptedLinear):
        return Form, ""
    if issubclass(kind, AdaptedMultiheadAttention) and parameter == "in_proj_weight":
        return Form, ""
    if issubclass(kind, AdaptedConvolution):
        reason = _other_convolution(module, kind.adapts)
        return (None, reason) if reason else (ConvolutionForm, "")
    if issubclass(kind, AdaptedEmbedding):
        if module.max_norm is None:
            return EmbeddingForm, ""
        return None, "PEFT limits the norm of an embedding's factor instead of that of the adapted rows"
    if isinstance(module, nn.Embedding) and _scales_its_rows(module):
        return EmbeddingForm, ""
    known = kind_of(module) or kind
    if issubclass(known, AdaptedLinear | AdaptedEmbedding | AdaptedConvolution):
        return None, f"PEFT adds its change to the output of {plain.__name__}, whose forward is its own"
    return None, f"PEFT has no adapter for {plain.__name__}.{parameter}"


def parameter_form(
    module: nn.Module, parameter: str, layout: Layout, size: tuple[int, ...]
) -> tuple[type[Form] | None, str]:
    """Return how PEFT stores an adapter that ``target_parameters`` puts on a parameter.

    Args:
        module: The module that has it.
        parameter: Its name.
        layout: How it lies as a matrix.
        size: Its size.

    Returns:
        As for ``layer_form``.
    """
    matrix = len(size) == 2 and not layout.transposed
    stack = layout.stacked and not (size[0] == 1 and layout.transposed)
    if matrix or stack:
        return ParameterForm, ""
    return None, f"PEFT takes the {parameter} of a {plain_class(module).__name__} for another matrix than it is"


def _hadamard_form(layer: Any, kind: type[AdaptedLayer]) -> tuple[type[Form] | None, str]:
    """Return how PEFT stores HiRA's factors: what it multiplies is the weight itself, in the layer's own geometry."""
    if issubclass(kind, AdaptedLinear):
        return HadamardForm, ""
    if issubclass(kind, AdaptedEmbedding) and layer.max_norm is None:
        return HadamardEmbeddingForm, ""
    if issubclass(kind, AdaptedConvolution) and layer.groups == 1 and layer.padding_mode == "zeros":
        return HadamardConvolutionForm, ""
    return None, (
        "PEFT has HiRA on linear layers, on embeddings without max_norm, and on convolutions with zeros around and "
        "without groups"
    )


def _other_convolution(layer: Any, known: tuple[type[nn.Module], ...]) -> str:
    """Return in what PEFT's convolution with A differs from the layer's own, or nothing.

    It has the layer's kernel size, stride and padding, and nothing else of it.
    """
    if layer.groups > 1:
        return f"PEFT's factors do not keep to the groups={layer.groups} of a convolution"
    if any(dilation > 1 and kernel > 1 for dilation, kernel in zip(layer.dilation, layer.kernel_size, strict=True)):
        return f"PEFT's factors leave the dilation={layer.dilation} of a convolution out"
    if layer.padding_mode != "zeros" and layer.padding != "valid" and any(p != 0 for p in layer.padding):
        return f"PEFT's factors pad with zeros, whatever a convolution's padding_mode={layer.padding_mode!r}"
    if plain_class(layer) not in known:
        return f"PEFT would call the constructor of {plain_class(layer).__name__} for its factors"
    return ""


@torch.no_grad()
def _scales_its_rows(embedding: Any) -> bool:
    """Tell whether an embedding's rows are those of its weight times ``embed_scale``, which PEFT takes into account."""
    if not hasattr(embedding, "embed_scale") or embedding.weight.is_meta or embedding.max_norm is not None:
        return False
    index = torch.arange(min(2, embedding.num_embeddings), device=embedding.weight.device)
    rows: Tensor = plain_class(embedding).forward(embedding, index)
    return torch.allclose(rows, embedding.weight[index] * embedding.embed_scale)
