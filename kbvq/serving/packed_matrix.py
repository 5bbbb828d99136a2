"""The modules that stand in a model where Linears and its embedding were, with packed weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kbvq_kernels
from kbvq.codes.packing import dequantize_expert, dequantize_rows
from kbvq.serving.packed_module import PackedModule, kernels_serve
from kbvq.structures import WEIGHT, MatrixFormat


class PackedMatrixModule(PackedModule):
    """A packed matrix and the product with it."""

    weight: Tensor  # the codes

    def __init__(self, format: MatrixFormat) -> None:
        super().__init__({WEIGHT: format.weight})
        self.format = format

    def project(self, inputs: Tensor) -> Tensor:
        """weight @ inputs: [..., in_features] -> [..., out_features] in the same dtype.

        The kernels serve CPU and CUDA; other devices, and inputs that need a gradient, the decoded weight.
        """
        if not kernels_serve(inputs):
            weight = dequantize_expert(self.format.weight, self.projection_tensors(WEIGHT), 0, inputs.dtype)
            return F.linear(inputs, weight)
        (prepared,) = self.kernel_projections(inputs.dtype)
        return kbvq_kernels.linear(inputs.flatten(0, -2), prepared).unflatten(0, inputs.shape[:-1])

    def extra_repr(self) -> str:
        weight = self.format.weight
        bits = 8 * weight.num_bytes / weight.num_weights
        return f"[{weight.out_features}, {weight.in_features}] in {bits:.3f} bits"


class PackedLinear(PackedMatrixModule):
    """In the place of a Linear, whose bias it keeps as it is."""

    bias: nn.Parameter | None

    def __init__(self, format: MatrixFormat, bias: nn.Parameter | None) -> None:
        super().__init__(format)
        self.in_features, self.out_features = format.weight.in_features, format.weight.out_features
        self.register_parameter("bias", bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features] in the same dtype."""
        outputs = self.project(inputs)
        return outputs if self.bias is None else outputs + self.bias


class PackedEmbedding(PackedMatrixModule):
    """In the place of an Embedding; decodes the rows that it is asked for.

    dtype: of the rows, that of the model. It is cast along with the model, although nothing stored has it.
    """

    def __init__(self, format: MatrixFormat, dtype: torch.dtype, padding_idx: int | None = None) -> None:
        super().__init__(format)
        self.num_embeddings, self.embedding_dim = format.weight.out_features, format.weight.in_features
        self.dtype, self.padding_idx = dtype, padding_idx

    def forward(self, inputs: Tensor) -> Tensor:
        """Rows of tokens, integers [...] -> [..., embedding_dim]; of hidden states, the product of the head that is
        tied to it: through here, so that whoever moves the weights to a device for this module does it for that too."""
        if inputs.is_floating_point():
            return self.project(inputs)
        rows = dequantize_rows(self.format.weight, self.projection_tensors(WEIGHT), inputs.flatten(), self.dtype)
        return rows.view(*inputs.shape, self.embedding_dim)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedEmbedding:
        self.dtype = fn(torch.empty(1, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)


class TiedHead(nn.Module):
    """In the place of a Linear whose weight is the embedding's: there is one packed tensor, and that is the
    embedding's."""

    bias: nn.Parameter | None

    def __init__(self, embedding: PackedEmbedding, bias: nn.Parameter | None) -> None:
        super().__init__()
        self._embedding = (embedding,)  # not a module of this one: its tensors are stored once
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.register_parameter("bias", bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features] in the same dtype."""
        (embedding,) = self._embedding
        outputs = embedding(inputs.to(embedding.weight.device)).to(inputs.device)
        return outputs if self.bias is None else outputs + self.bias
