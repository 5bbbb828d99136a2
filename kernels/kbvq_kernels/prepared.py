"""Which formats are served, and the form of a packed projection that the kernels read."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kbvq_kernels.reference import ACTIVATIONS, MAX_TAIL, TRELLIS_STATE_BITS, trellis_codewords, trellis_levels

logger = logging.getLogger(__name__)

CODEBOOKS = ("vq", "rq", "rq-grouped", "trellis")
CODEBOOK_SIZES = (256, 4096)
TRELLIS_SIZES = (2, 4, 8, 16)
VECTOR_DIMS = (2, 4, 8)
MAX_STAGES = 3
MAX_GROUPS = 256
MAX_RANK = 256

_CACHED_GROUPS = 8  # of 256 codewords: 64 KiB a stage in float32; 256 of them, timed in bench/cpu.py, are 2 MiB


def supports(
    *,
    codebook: str,
    vector_dim: int,
    codebook_size: int,
    num_stages: int = 1,
    rank: int = 0,
    factor_dtype: str = "float16",
    signed: bool = False,
    codebook_dtype: str = "float16",
    num_groups: int = 1,
    tail: int = 0,
    activation: str = "silu",
    **_: object,
) -> str | None:
    """None when the kernels serve this format, else the reason why not. Takes the fields of a projection's format."""
    trellis = codebook == "trellis"
    for name, value, served in (
        ("codebook", codebook, CODEBOOKS),
        ("vector_dim", vector_dim, (1,) if trellis else VECTOR_DIMS),
        ("codebook_size", codebook_size, TRELLIS_SIZES if trellis else CODEBOOK_SIZES),
        ("codebook_dtype", codebook_dtype, ("float16", "int8")),
        ("factor_dtype", factor_dtype, ("float16", "int8")),
        ("activation", activation, tuple(ACTIVATIONS)),
    ):
        if value not in served:
            return f"no kernel serves {name} {value!r}; served: {', '.join(map(str, served))}"
    if not 1 <= num_stages <= MAX_STAGES or (codebook in ("vq", "trellis") and num_stages != 1):
        return (
            f"no kernel serves codebook {codebook!r} with {num_stages} stages; "
            f"vq and trellis have 1, rq and rq-grouped up to {MAX_STAGES}"
        )
    if signed and (codebook != "vq" or codebook_size != 256 or vector_dim == 2):
        return (
            f"no kernel serves sign bits with codebook {codebook!r} of {codebook_size} and vector_dim {vector_dim}; "
            "they go with vq of 256 and vector_dim 4 or 8"
        )
    if num_groups != 1 and (codebook != "rq-grouped" or not 1 <= num_groups <= MAX_GROUPS):
        return f"no kernel serves codebook {codebook!r} with {num_groups} groups; rq-grouped has up to {MAX_GROUPS}"
    if not 0 <= tail <= (MAX_TAIL if trellis else 0):
        return f"no kernel serves codebook {codebook!r} with tail {tail}; trellis has 0 to {MAX_TAIL}, others 0"
    if not 0 <= rank <= MAX_RANK:
        return f"no kernel serves a low-rank part of rank {rank}; at most {MAX_RANK}"
    return None


def slower_than_bf16(
    *,
    codebook: str,
    codebook_size: int,
    num_stages: int = 1,
    num_groups: int = 1,
    device_type: str = "cuda",
    **_: object,
) -> str | None:
    """Why this served format is expected to decode no faster than bfloat16 weights, or more slowly, else None.

    On CUDA from the ceilings in README.md, which were computed, not timed; on CPU from timings there.
    """
    if device_type == "cpu":
        if num_stages > 1 and num_groups > _CACHED_GROUPS:
            return f"tables of {num_groups * codebook_size} codewords are more than the cache of a core"
        return None
    if num_stages >= 3 or (num_stages == 2 and (codebook_size > 256 or num_groups > 1)):
        return f"{num_stages} stages of {num_groups * codebook_size} codewords cost too many table lookups"
    return None


@cache
def _warn(reason: str, device_type: str) -> None:
    logger.warning("kbvq: these experts are expected to run no faster on %s than in bfloat16: %s", device_type, reason)


@dataclass(frozen=True)
class PreparedProjection:
    """A packed projection as the kernels read it.

    codes: uint8 [E, N, row_bytes]; per stage `plane` low bytes, then for 12-bit codes `plane / 2` bytes of
        nibbles; then for signed codes `plane * vector_dim / 8` bytes of signs. `plane` is the number of vectors
        rounded up so that every plane starts at a multiple of 16 bytes. Trellis: [E, K, N * bits / 8], as stored.
    table: codewords [1 or E, num_tables, codebook_size, vector_dim]; on CPU float32; on CUDA bfloat16 or float16; the
        integers themselves where they are stored in int8. Trellis: the value of each state, [1, 1, 4096, 1].
    words: what the kernels look up on CUDA, made by `table_words`: int32 or int64 [1 or E, num_tables, words per
        codeword, codebook_size]; trellis: its 256 levels, each as two equal 16-bit floats, int32 [256]. On CPU the
        int8 codewords themselves where there is one stage of them, else None; trellis: the values of rows n and n + 1,
        as 16-bit floats, low half first, for each window of 12 + bits bits that their states share, int32
        [2^(12 + bits)].
    groups: uint8 [1 or E, codebook_size], the group of each codeword of stage 0, or None.
    scale: [E, N] float16, or float32 where the scale of an int8 table is part of it, or None. bias: float16 or None.
    basis: [rank, K], coefficients: [E, N, rank], both float16 or both int8, or None.
    factor_scale: float32 [E, rank], multiplies basis @ x of each expert (the int8 scales of basis and coefficients,
        over the scale of the table where that is part of `scale`), or None.
    """

    codes: Tensor
    table: Tensor
    words: Tensor | None
    groups: Tensor | None
    scale: Tensor | None
    bias: Tensor | None
    basis: Tensor | None
    coefficients: Tensor | None
    factor_scale: Tensor | None
    in_features: int
    plane: int
    num_stages: int
    trellis_bits: int
    tail: int
    signed: bool

    @property
    def num_experts(self) -> int:
        return self.codes.shape[0]

    @property
    def out_features(self) -> int:
        return self.codes.shape[2] * 8 // self.trellis_bits if self.trellis_bits else self.codes.shape[1]

    @property
    def row_bytes(self) -> int:
        return self.codes.shape[2]

    @property
    def num_tables(self) -> int:
        return self.table.shape[1]

    @property
    def num_groups(self) -> int:
        """Tables of each stage after the first."""
        return (self.num_tables - 1) // (self.num_stages - 1) if self.num_stages > 1 else 1

    @property
    def codebook_size(self) -> int:
        return self.table.shape[2]

    @property
    def vector_dim(self) -> int:
        return self.table.shape[3]

    @property
    def wide(self) -> bool:
        """Codes of 12 bits, in two planes."""
        return self.codebook_size > 256 and not self.trellis_bits

    @property
    def num_vectors(self) -> int:
        return self.in_features // self.vector_dim

    @property
    def rank(self) -> int:
        return 0 if self.basis is None else self.basis.shape[0]

    def tensors(self) -> list[Tensor | None]:
        """The tensors in the order in which the custom ops take them."""
        codewords = [self.codes, self.table, self.words, self.groups]
        return [*codewords, self.scale, self.bias, self.basis, self.coefficients, self.factor_scale]

    def numbers(self) -> list[int]:
        """What the tensors do not determine, in the order in which the custom ops take it."""
        return [self.in_features, self.plane, self.num_stages, self.trellis_bits, self.tail, int(self.signed)]

    @classmethod
    def from_tensors(cls, tensors: list[Tensor | None], numbers: list[int]) -> PreparedProjection:
        return cls(*tensors, *numbers[:-1], bool(numbers[-1]))


def table_words(table: Tensor) -> Tensor:
    """`PreparedProjection.words` of a table of 16-bit codewords."""
    words = table.view(torch.int64 if table.shape[-1] >= 4 else torch.int32)
    return words.transpose(-1, -2).contiguous()


@cache
def trellis_pairs(bits: int, tail: int) -> Tensor:
    """`PreparedProjection.words` of trellis codes on CPU; one tensor for all projections of these levels, so that it
    stays in cache."""
    windows = torch.arange(1 << TRELLIS_STATE_BITS + bits)
    values = trellis_codewords(bits, tail)
    pairs = torch.stack([values[windows & (1 << TRELLIS_STATE_BITS) - 1], values[windows >> bits]], -1)
    return pairs.view(torch.int32)[:, 0].contiguous()


def _aligned_codes(codes: Tensor, num_vectors: int, plane: int, num_stages: int, wide: bool, sign_bytes: int) -> Tensor:
    """Rows whose planes start at multiples of 16 bytes: the same tensor where they do already, else a padded copy."""
    if plane == num_vectors:
        shared = codes.is_contiguous() and codes.data_ptr() % 16 == 0
        return codes if shared else codes.clone(memory_format=torch.contiguous_format)
    sizes = ([num_vectors] + [(num_vectors + 1) // 2] * wide) * num_stages + [sign_bytes] * (sign_bytes > 0)
    padded = ([plane] + [plane // 2] * wide) * num_stages + [-(-sign_bytes * plane // num_vectors)] * (sign_bytes > 0)
    planes = codes.split(sizes, -1)
    return torch.cat([F.pad(part, (0, want - part.shape[-1])) for part, want in zip(planes, padded, strict=True)], -1)


def _check_shapes(
    tensors: Mapping[str, Tensor], trellis: bool, int8_table: bool, int8_factors: bool, signed: bool, in_features: int,
    vector_dim: int, codebook_size: int, num_stages: int, num_groups: int, rank: int,
) -> None:  # fmt: skip
    """Raises ValueError unless every tensor that the format needs has the shape that the kernels rely on."""
    codes = tensors["codes"]
    if codes.dim() != 3 or codes.dtype != torch.uint8 or in_features < 1 or in_features % vector_dim:
        raise ValueError(f"codes are uint8 with 3 dimensions, in_features vectors of {vector_dim}; got {codes.dtype} "
                         f"{list(codes.shape)} and {in_features}")  # fmt: skip
    if signed and in_features % 8:
        raise ValueError(f"sign bits need in_features in multiples of 8, not {in_features}")
    experts, rows, row_bytes = codes.shape
    shapes: dict[str, tuple[int, ...]] = {}
    if trellis:
        bits = codebook_size.bit_length() - 1
        if row_bytes * 8 % bits or row_bytes * 8 < TRELLIS_STATE_BITS:
            raise ValueError(f"streams of {row_bytes} bytes hold no whole number of {bits}-bit codes, or no state")
        shapes["codes"] = experts, in_features, row_bytes
        rows = row_bytes * 8 // bits
    else:
        books = tensors["codebook"].shape[0] if "codebook" in tensors else 1
        vectors, tables = in_features // vector_dim, 1 + (num_stages - 1) * num_groups
        if books not in (1, experts):
            raise ValueError(f"{experts} experts have 1 codebook or {experts}, not {books}")
        stage_bytes = vectors + (vectors + 1) // 2 * (codebook_size > 256)
        shapes["codes"] = experts, rows, num_stages * stage_bytes + in_features // 8 * signed
        shapes["codebook"] = books, tables, codebook_size, vector_dim
        if int8_table:
            shapes["codebook_scale"] = books, tables
        if num_groups > 1:
            shapes["groups"] = books, codebook_size
    if rank:
        shapes |= {"basis": (rank, in_features), "coefficients": (experts, rows, rank)}
        if int8_factors:
            shapes |= {"basis_scale": (rank,), "coefficients_scale": (experts, rank)}
    shapes |= {name: (experts, rows) for name in ("scale", "bias") if name in tensors}
    for name, shape in shapes.items():
        if name not in tensors or tensors[name].shape != shape:
            found = list(tensors[name].shape) if name in tensors else "missing"
            raise ValueError(f"{name} is {found}, the format makes it {list(shape)}; the packed tensors are damaged")


def _check_values(tensors: Mapping[str, Tensor], signed: bool, int8_table: bool, num_groups: int) -> None:
    """Raises ValueError for codewords that the kernels would misread, and groups that would lead them past the tables.

    Codes need no check: 8 bits choose among 256 codewords, 12 among 4096.
    """
    lowest = 0 if signed else -127 if int8_table else None
    if lowest is not None and int(tensors["codebook"].min()) < lowest:
        raise ValueError(f"a codebook of this format has no values below {lowest}; the packed tensors are damaged")
    if num_groups > 1 and int(tensors["groups"].max()) >= num_groups:
        raise ValueError(
            f"groups holds {int(tensors['groups'].max())}, the format has {num_groups}; the packed tensors are damaged"
        )


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
    signed: bool = False,
    codebook_dtype: str = "float16",
    num_groups: int = 1,
    tail: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    device_type: str | None = None,
    **_: object,
) -> PreparedProjection:
    """Packed tensors, all on one device, into the form the kernels read; to be done once at load.

    Takes the tensors of a packed projection, its format's fields and the dtype of the hidden states. device_type:
    "cpu" or "cuda", whose kernels are to read the result; None for the device of the tensors. The codes
    are shared, not copied, when their planes already start at multiples of 16 bytes (16 vectors a row for 8-bit
    codes, 32 for 12-bit ones and for signed ones of 4: every published model); else a padded copy is made.

    On CUDA float16 codewords are rounded to `dtype` when that is bfloat16: the same relative error, 2^-9, as the
    bfloat16 weights they stand for, and each then costs one instruction less per weight to unpack.
    A format that is expected to run slower than bfloat16 (`slower_than_bf16`) is named in one warning.
    The scale of int8 tables moves to the row scale and, inversely, to `factor_scale`, all in float32.
    Raises ValueError for a format that `supports` refuses, for a tensor that is missing or of another shape than the
    format's, for int8 codewords outside [-127, 127] or, when signed, codewords below 0, and for groups that have no
    table.
    """
    reason = supports(
        codebook=codebook,
        vector_dim=vector_dim,
        codebook_size=codebook_size,
        num_stages=num_stages,
        rank=rank,
        factor_dtype=factor_dtype,
        signed=signed,
        codebook_dtype=codebook_dtype,
        num_groups=num_groups,
        tail=tail,
    )
    if reason:
        raise ValueError(reason)
    codes = tensors["codes"]
    sizes = in_features, vector_dim, codebook_size, num_stages, num_groups, rank
    _check_shapes(tensors, codebook == "trellis", codebook_dtype == "int8", factor_dtype == "int8", signed, *sizes)
    if not codes.is_meta:
        _check_values(tensors, signed, codebook_dtype == "int8", num_groups)
    device_type = device_type or codes.device.type
    on_cpu = device_type == "cpu"
    reason = slower_than_bf16(
        codebook=codebook,
        codebook_size=codebook_size,
        num_stages=num_stages,
        num_groups=num_groups,
        device_type=device_type,
    )
    if reason and device_type != "meta":
        _warn(reason, device_type)
    word = torch.float32 if on_cpu else torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    half = {name: t.to(torch.float16).contiguous() for name, t in tensors.items() if t.is_floating_point()}
    integers = {name: t.contiguous() for name, t in tensors.items() if not t.is_floating_point() and name != "codes"}
    stored = half | integers
    scale, factor_scale = stored.get("scale"), None
    if "basis_scale" in stored:
        factor_scale = stored["basis_scale"].float() * stored["coefficients_scale"].float()

    if codebook == "trellis":
        bits, plane = codebook_size.bit_length() - 1, 0
        codes = _aligned_codes(codes, 0, 0, 1, False, 0)
        table = trellis_codewords(bits, tail).to(codes.device, word)[None, None, :, None]
        if on_cpu:
            words = trellis_pairs(bits, tail)
        else:
            words = trellis_levels(tail).to(codes.device, word)[:, None].repeat(1, 2).view(torch.int32)[:, 0]
    else:
        bits, num_vectors = 0, in_features // vector_dim
        unit = 128 // vector_dim if signed else 32 if codebook_size > 256 else 16
        plane = -(-num_vectors // unit) * unit
        sign_bytes = in_features // 8 if signed else 0
        codes = _aligned_codes(codes, num_vectors, plane, num_stages, codebook_size > 256, sign_bytes)
        table = stored["codebook"]
        if codebook_dtype == "float16":
            table = table.to(word)
        else:
            moved = stored["codebook_scale"], codes.shape[:2], scale, factor_scale, rank
            scale, factor_scale, relative = _moved_scales(*moved)
            table = (table * relative[..., None, None]).to(word)
        if not on_cpu:
            words = table_words(table)
        else:
            words = stored["codebook"] if codebook_dtype == "int8" and num_stages == 1 else None
    return PreparedProjection(
        codes,
        table,
        words,
        stored.get("groups"),
        scale,
        stored.get("bias"),
        stored.get("basis"),
        stored.get("coefficients"),
        factor_scale,
        in_features,
        plane,
        num_stages,
        bits,
        tail,
        signed,
    )


def _moved_scales(
    codebook_scale: Tensor, shape: torch.Size, scale: Tensor | None, factor_scale: Tensor | None, rank: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(scale, factor_scale, relative scale of each table) that give int8 codewords their scale, all float32.

    With c the largest scale of an expert's tables, scale * (sum_s c_s q_s + coefficients @ basis) is
    scale c * (sum_s (c_s / c) q_s + coefficients @ basis / c): one table needs no multiplication of its own.
    """
    experts, rows = shape
    codebook_scale = codebook_scale.float()
    largest = codebook_scale.abs().amax(-1, keepdim=True)
    largest = torch.where(largest == 0, 1.0, largest)  # tables of zeros
    per_expert = largest.expand(experts, 1)
    scale = per_expert.expand(experts, rows) if scale is None else scale.float() * per_expert
    if rank:
        factor_scale = (torch.ones_like(largest) if factor_scale is None else factor_scale) / per_expert
        factor_scale = factor_scale.expand(experts, rank).contiguous()
    return scale.contiguous(), factor_scale, codebook_scale / largest
