"""What all modules with packed weights share: the buffers, and the form in which the kernels read them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

import kbvq_kernels
from kbvq.codes.packing import expand
from kbvq.structures import ProjectionFormat, buffer_name
from kbvq_kernels import PreparedProjection


class PackedModule(nn.Module):
    """Buffers of packed projections, by the names of the weights that they replace.

    Every tensor of a format is a persistent buffer, not a parameter: integers cannot be parameters of a
    trainable model, and a non-persistent buffer would hold garbage after a load through the meta device.
    """

    def __init__(self, formats: Mapping[str, ProjectionFormat]) -> None:
        super().__init__()
        self.formats = dict(formats)
        self._prepared: tuple[tuple, list[PreparedProjection]] | None = None
        for projection, format in self.formats.items():
            for name, spec in format.tensors().items():
                self.register_buffer(buffer_name(projection, name), torch.zeros(spec.shape, dtype=spec.dtype))

    def projection_format(self, projection: str) -> ProjectionFormat:
        return self.formats[projection]

    def projection_tensors(self, projection: str) -> dict[str, Tensor]:
        """The stored tensors of one projection by their names in the format."""
        return {name: getattr(self, buffer_name(projection, name)) for name in self.formats[projection].tensors()}

    def lookup_form(self, projection: str) -> tuple[ProjectionFormat, Mapping[str, Tensor]]:
        """Format and tensors of one projection as tables, made of its network if it has one (`expand`)."""
        return expand(self.formats[projection], self.projection_tensors(projection))

    def kernel_projections(self, dtype: torch.dtype) -> list[PreparedProjection]:
        """The projections as the kernels read them, for hidden states of that dtype; made at the first call, and again
        when a buffer has changed."""
        if torch.compiler.is_compiling() and self._prepared is not None:
            return self._prepared[1]
        buffers = [tensor for name in self.formats for tensor in self.projection_tensors(name).values()]
        state = (dtype, *((t.device, t.dtype, t.data_ptr(), 0 if t.is_inference() else t._version) for t in buffers))
        if self._prepared is None or self._prepared[0] != state:
            made = self._prepare(dtype)
            if hasattr(self, "_hf_hook"):  # accelerate may take the buffers away again: keep no reference to them
                return made
            self._prepared = (state, made)
        return self._prepared[1]

    def _prepare(self, dtype: torch.dtype) -> list[PreparedProjection]:
        forms = [self.lookup_form(projection) for projection in self.formats]
        return [kbvq_kernels.prepare(tensors, **format.to_dict(), dtype=dtype) for format, tensors in forms]


def kernels_serve(inputs: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels can take these inputs: on CPU and CUDA, and without a gradient, of the others neither."""
    if inputs.device.type not in ("cpu", "cuda"):
        return False
    return not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (inputs, *others)))
