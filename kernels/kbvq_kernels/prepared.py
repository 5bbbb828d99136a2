"""Which formats are served, and the form of a packed projection that the kernels read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kbvq_kernels.reference import ACTIVATIONS

CODEBOOKS = ("vq", "rq")
CODEBOOK_SIZES = (256, 4096)
VECTOR_DIMS = (2, 4, 8)
MAX_STAGES = 3
MAX_RANK = 256


def supports(
    *,
    codebook: str,
    vector_dim: int,
    codebook_size: int,
    num_stages: int = 1,
    rank: int = 0,
    factor_dtype: str = "float16",
    activation: str = "silu",
    **_: object,
) -> str | None:
    """None when the kernels serve this format, else the reason why not. Takes the fields of a projection's format."""
    for name, value, served in (
        ("codebook", codebook, CODEBOOKS),
        ("vector_dim", vector_dim, VECTOR_DIMS),
        ("codebook_size", codebook_size, CODEBOOK_SIZES),
        ("factor_dtype", factor_dtype, ("float16", "int8")),
        ("activation", activation, tuple(ACTIVATIONS)),
    ):
        if value not in served:
            return f"no kernel serves {name} {value!r}; served: {', '.join(map(str, served))}"
    if not 1 <= num_stages <= MAX_STAGES or (codebook == "vq" and num_stages != 1):
        return f"no kernel serves codebook {codebook!r} with {num_stages} stages; vq has 1, rq up to {MAX_STAGES}"
    if not 0 <= rank <= MAX_RANK:
        return f"no kernel serves a low-rank part of rank {rank}; at most {MAX_RANK}"
    return None


@dataclass(frozen=True)
class PreparedProjection:
    """A packed projection as the kernels read it.

    codes: uint8 [E, N, row_bytes]; per stage `plane` low bytes, then for 12-bit codes `plane / 2` bytes of
        nibbles. `plane` is the number of vectors rounded up so that every plane starts at a multiple of 16 bytes.
    table: codewords [1 or E, num_stages, codebook_size, vector_dim]; bfloat16 or float16 on CUDA, float32 on CPU.
    words: on CUDA the same codewords as words of 8 bytes (4 when vector_dim is 2), int64 or int32
        [1 or E, num_stages, words per codeword, codebook_size]; None on CPU.
    scale, bias: float16 [E, N] or None.
    basis: [rank, K], coefficients: [E, N, rank], both float16 or both int8, or None.
    factor_scale: float32 [E, rank], the product of the int8 scales of basis and coefficients, or None.
    """

    codes: Tensor
    table: Tensor
    words: Tensor | None
    scale: Tensor | None
    bias: Tensor | None
    basis: Tensor | None
    coefficients: Tensor | None
    factor_scale: Tensor | None
    in_features: int
    plane: int

    @property
    def num_experts(self) -> int:
        return self.codes.shape[0]

    @property
    def out_features(self) -> int:
        return self.codes.shape[1]

    @property
    def row_bytes(self) -> int:
        return self.codes.shape[2]

    @property
    def num_stages(self) -> int:
        return self.table.shape[1]

    @property
    def codebook_size(self) -> int:
        return self.table.shape[2]

    @property
    def vector_dim(self) -> int:
        return self.table.shape[3]

    @property
    def wide(self) -> bool:
        """Codes of 12 bits, in two planes."""
        return self.codebook_size > 256

    @property
    def num_vectors(self) -> int:
        return self.in_features // self.vector_dim

    @property
    def rank(self) -> int:
        return 0 if self.basis is None else self.basis.shape[0]

    def tensors(self) -> list[Tensor | None]:
        """The tensors in the order in which the custom ops take them."""
        factors = [self.basis, self.coefficients, self.factor_scale]
        return [self.codes, self.table, self.words, self.scale, self.bias, *factors]

    @classmethod
    def from_tensors(cls, tensors: list[Tensor | None], in_features: int, plane: int) -> PreparedProjection:
        return cls(*tensors, in_features, plane)


def table_words(table: Tensor) -> Tensor:
    """`PreparedProjection.words` of a table of 16-bit codewords."""
    words = table.view(torch.int64 if table.shape[-1] >= 4 else torch.int32)
    return words.transpose(-1, -2).contiguous()


def prepare(
    tensors: Mapping[str, Tensor],
    *,
    in_features: int,
    codebook: str,
    vector_dim: int,
    codebook_size: int,
    num_stages: int = 1,
    rank: int = 0,
    factor_dtype: str = "float16",
    dtype: torch.dtype = torch.bfloat16,
    **_: object,
) -> PreparedProjection:
    """Packed tensors, all on one device, into the form the kernels read; to be done once at load.

    Takes the tensors of a packed projection, its format's fields and the dtype of the hidden states. The codes
    are shared, not copied, when their planes already start at multiples of 16 bytes (16 vectors a row for 8-bit
    codes, 32 for 12-bit ones: every published model); else a padded copy is made.

    On CUDA the codewords are rounded to `dtype` when that is bfloat16: the same relative error, 2^-9, as the
    bfloat16 weights they stand for, and each then costs one instruction less per weight to unpack.
    Raises ValueError for a format that `supports` refuses.
    """
    reason = supports(
        codebook=codebook,
        vector_dim=vector_dim,
        codebook_size=codebook_size,
        num_stages=num_stages,
        rank=rank,
        factor_dtype=factor_dtype,
    )
    if reason:
        raise ValueError(reason)
    wide, num_vectors = codebook_size > 256, in_features // vector_dim
    unit = 32 if wide else 16
    plane = -(-num_vectors // unit) * unit
    codes = tensors["codes"]
    if plane != num_vectors:
        stages = codes.unflatten(-1, (num_stages, -1))
        planes = [F.pad(stages[..., :num_vectors], (0, plane - num_vectors))]
        if wide:
            planes.append(F.pad(stages[..., num_vectors:], (0, plane // 2 - (num_vectors + 1) // 2)))
        codes = torch.cat(planes, -1).flatten(-2)
    elif not codes.is_contiguous() or codes.data_ptr() % 16:
        codes = codes.clone(memory_format=torch.contiguous_format)

    word = torch.float32 if codes.device.type == "cpu" else torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    half = {name: t.to(torch.float16).contiguous() for name, t in tensors.items() if t.is_floating_point()}
    integers = {name: t.contiguous() for name, t in tensors.items() if not t.is_floating_point() and name != "codes"}
    stored = half | integers
    table = tensors["codebook"].to(word).contiguous()
    factor_scale = None
    if "basis_scale" in stored:
        factor_scale = stored["basis_scale"].float() * stored["coefficients_scale"].float()
    return PreparedProjection(
        codes,
        table,
        None if word == torch.float32 else table_words(table),
        stored.get("scale"),
        stored.get("bias"),
        stored.get("basis"),
        stored.get("coefficients"),
        factor_scale,
        in_features,
        plane,
    )
