"""The data that flows through kbvq: what is quantized, from which statistics, and what is stored.

Everything here is a frozen dataclass with the shape and dtype of each tensor stated. Weights are
`[out_features, in_features]`. A *bank* is a group of experts that see the same input and are packed
together: the routed experts of one layer, or one shared expert (a bank of one). A bank has two
*projections*: `gate_up_proj` (gate rows first, then up rows) and `down_proj`. Where its experts have
different rates, those of the same rates are a *tier*, and stored as a bank of their own.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kbvq.errors import ConfigError

PROJECTIONS = ("gate_up_proj", "down_proj")

MakeZeros = Callable[..., Tensor]
"""Makes a float32 tensor of zeros; called as torch.zeros is, with its shape and device=."""

TIERS = "tiers"
"""Under a bank's path, where the tiers behind its first one are."""

WEIGHT = "weight"
"""Name of the only projection of a matrix outside the banks."""

INDEX_BITS = {256: 8, 4096: 12}
"""Codebook size -> bits of one code; the sizes that `kbvq.codes.packing` can store."""

CODEBOOKS = ("vq", "rq", "rq-grouped", "rq-moe", "trellis")
"""Names of the code formats; see `ProjectionFormat`."""

MAX_GROUPS = 256
"""Groups of the first codewords of rq-grouped: a byte names one."""

RQ_MOE_REFINERS, RQ_MOE_WIDTH = 4, 16
"""Refiners of the network of rq-moe, each one block deep, and hidden units of each (`kbvq.codes.rq_moe`)."""

MAX_TAIL = 50
"""How far the levels of a trellis code can be stretched (`kbvq.codes.levels`)."""

TRELLIS_STATE_BITS = 12
"""Bits of the stream that a value of a trellis code depends on (see `kbvq.codes.trellis`)."""


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one stored tensor; the lowest and highest value it may hold, where the dtype allows more."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    bounds: tuple[int, int] | None = None

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class ProjectionFormat:
    """How one projection of a bank is stored: all that a reader needs besides the tensors.

    The stored weight of expert e is

        scale_e[:, None] * (decode(codes_e) + coefficients_e @ basis) * column_scale    [out_features, in_features]

    and the output is `weight @ x + bias_e`. A term whose tensors are absent is left out.

    codebook: name of the code format.
        "vq": a codeword for every `vector_dim` weights of a row. With `signed` the codebook holds magnitudes and each
            weight has a sign bit of its own.
        "rq": the sum of `num_stages` codewords, stage s from table s.
        "rq-grouped": the same, but the codeword of stage 0 belongs to one of `num_groups` groups, and the later stages
            take theirs from the tables of that group.
        "rq-moe": the sum of a codeword of stage 0 and one of stage 1 that a small network makes of both codes; what is
            stored is the network (`kbvq.codes.expansion`), what is decoded the tables of `expanded`.
        "trellis": one value per weight, a function of a window of the expert's bit stream; a stream for each column,
            down its rows. codebook_size 2^bits, vector_dim 1, no table is stored. tail: how far its levels are
            stretched (`kbvq.codes.levels`), from 0 to MAX_TAIL.
    num_codebooks: 1 when the bank shares a codebook, `num_experts` when each expert has its own.
    rank: rows of the shared low-rank basis, 0 for none.
    codebook_dtype: "float16", or "int8" with one float16 scale per table.
    factor_dtype: "float16", or "int8" with one float16 scale per basis row and per expert and column
        of the coefficients.
    """

    num_experts: int
    out_features: int
    in_features: int
    codebook: str
    vector_dim: int
    codebook_size: int
    num_stages: int = 1
    num_codebooks: int = 1
    has_scale: bool = False
    has_bias: bool = False
    rank: int = 0
    factor_dtype: str = "float16"
    signed: bool = False
    codebook_dtype: str = "float16"
    num_groups: int = 1
    has_column_scale: bool = False
    tail: int = 0

    def __post_init__(self) -> None:
        self._check_fields()
        if self.codebook not in CODEBOOKS:
            raise ConfigError(f"codebook {self.codebook!r} is not known; use one of {', '.join(CODEBOOKS)}")
        if self.codebook == "trellis":
            self._check_trellis()
        elif self.codebook_size not in INDEX_BITS:
            raise ConfigError(f"codebook_size {self.codebook_size} cannot be packed; use one of {sorted(INDEX_BITS)}")
        if self.signed and (self.codebook != "vq" or self.in_features % 8):
            raise ConfigError(
                f"sign bits need codebook vq and in_features in multiples of 8, not {self.codebook} and "
                f"{self.in_features}; choose other --bits or another --codebook"
            )
        if self.codebook == "rq-moe":
            self._check_rq_moe()
        if self.num_groups != 1 and (self.codebook != "rq-grouped" or not 1 <= self.num_groups <= MAX_GROUPS):
            raise ConfigError(
                f"num_groups {self.num_groups}: rq-grouped has 1 to {MAX_GROUPS} groups, other codebooks 1"
            )
        if self.tail > (MAX_TAIL if self.codebook == "trellis" else 0):
            raise ConfigError(f"tail {self.tail}: trellis codes have 0 to {MAX_TAIL}, other codebooks 0")
        if self.in_features % self.vector_dim:
            raise ConfigError(
                f"in_features {self.in_features} is not a multiple of vector_dim {self.vector_dim}; choose other --bits"
            )
        if self.num_codebooks not in (1, self.num_experts):
            raise ConfigError(
                f"num_codebooks must be 1 or {self.num_experts} (one per expert), not {self.num_codebooks}"
            )
        for name in ("factor_dtype", "codebook_dtype"):
            if getattr(self, name) not in ("float16", "int8"):
                raise ConfigError(f"{name} must be float16 or int8, not {getattr(self, name)!r}")

    def _check_fields(self) -> None:
        """What a config.json could hold instead of an integer, a string or a bool, and numbers that count nothing."""
        types = {"int": int, "str": str, "bool": bool}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) is not types[str(field.type)]:
                raise ConfigError(f"{field.name} must be of type {field.type}, not {value!r}")
            lowest = 0 if field.name in ("rank", "tail") else 1
            if type(value) is int and value < lowest:
                raise ConfigError(f"{field.name} must be at least {lowest}, not {value}")

    def _check_rq_moe(self) -> None:
        """Until 2026-11-25 the tables of rq-grouped had this name: one stage, or several groups, or three stages."""
        if self.num_groups != 1 or self.num_stages != 2 or self.codebook_size != 256:
            raise ConfigError(
                f"codebook rq-moe has 2 stages of 256 codewords and no groups, not {self.num_stages} of "
                f"{self.codebook_size} and {self.num_groups}; tables by groups are named rq-grouped since 2026-11-25: "
                "write that name into the config.json of the checkpoint, or quantize the model again"
            )
        if self.num_codebooks != 1:
            raise ConfigError(
                f"codebook rq-moe has one network for all experts, not {self.num_codebooks}: expanded, each takes "
                "megabytes; choose --codebook-scope bank or another --codebook"
            )

    def _check_trellis(self) -> None:
        bits = self.trellis_bits
        if self.codebook_size not in (2, 4, 8, 16) or self.vector_dim != 1 or self.num_stages != 1:
            raise ConfigError(
                "a trellis code has vector_dim 1, 1 stage and codebook_size 2, 4, 8 or 16, not "
                f"{self.vector_dim}, {self.num_stages} and {self.codebook_size}"
            )
        if self.out_features * bits % 8 or self.out_features * bits < TRELLIS_STATE_BITS:
            raise ConfigError(
                f"{self.out_features} rows of {bits} bits fill no whole number of bytes, or less than one state of the "
                "trellis; choose another --codebook"
            )

    @property
    def trellis_bits(self) -> int:
        """Bits per value of a trellis code."""
        return self.codebook_size.bit_length() - 1

    @property
    def num_vectors(self) -> int:
        """Vectors in one row of one expert."""
        return self.in_features // self.vector_dim

    @property
    def sign_bytes(self) -> int:
        """Bytes of the sign plane of one row: a bit per weight, weight k in bit k mod 8 of byte k // 8; 1 is
        negative."""
        return self.in_features // 8 if self.signed else 0

    @property
    def row_bytes(self) -> int:
        """Bytes of the codes of one row: per stage a byte plane, then for 12-bit codes a nibble plane; then signs."""
        nibbles = (self.num_vectors + 1) // 2 if INDEX_BITS[self.codebook_size] == 12 else 0
        return self.num_stages * (self.num_vectors + nibbles) + self.sign_bytes

    @property
    def num_tables(self) -> int:
        """Tables of `codebook_size` codewords in one codebook: one per stage; in rq-grouped stage 0 has one, each later
        stage one per group, in the order (1, group 0), (1, group 1), …, (2, group 0), …; in rq-moe those of the two
        stages and the instructions of the first codes."""
        if self.codebook == "rq-moe":
            return 3
        return 1 + (self.num_stages - 1) * self.num_groups

    @property
    def expanded(self) -> ProjectionFormat:
        """The format of tables that decodes to the same: of rq-moe one that has a group for every first code, of the
        others their own."""
        if self.codebook != "rq-moe":
            return self
        return dataclasses.replace(self, codebook="rq-grouped", num_groups=self.codebook_size, codebook_dtype="float16")

    @property
    def network_values(self) -> int:
        """Numbers in the matrices of the network of rq-moe: P, G1, G2, B1, B2 (`kbvq.codes.rq_moe`)."""
        dim, refiners, width = self.vector_dim, RQ_MOE_REFINERS, RQ_MOE_WIDTH
        return 2 * dim * dim + 4 * refiners * (dim + refiners) + 2 * refiners * width * dim

    @property
    def num_weights(self) -> int:
        """Weights of the unquantized projection, all experts."""
        return self.num_experts * self.out_features * self.in_features

    def tensors(self) -> dict[str, TensorSpec]:
        """Every stored tensor by name, with its shape and dtype; the one definition of the format."""
        experts, rows = self.num_experts, self.out_features
        if self.codebook == "trellis":
            bits = self.trellis_bits
            specs = {"codes": TensorSpec((experts, self.in_features, rows * bits // 8), torch.uint8)}
        else:
            books, tables = self.num_codebooks, self.num_tables
            table = getattr(torch, self.codebook_dtype)
            bounds = (0 if self.signed else -127, 127) if self.codebook_dtype == "int8" else None
            specs = {
                "codes": TensorSpec((experts, rows, self.row_bytes), torch.uint8),
                "codebook": TensorSpec((books, tables, self.codebook_size, self.vector_dim), table, bounds),
            }
            if self.codebook_dtype == "int8":
                specs["codebook_scale"] = TensorSpec((books, tables), torch.float16)
            if self.codebook == "rq-moe":
                specs["network"] = TensorSpec((self.network_values,), torch.float16)
            if self.num_groups > 1:
                specs["groups"] = TensorSpec((books, self.codebook_size), torch.uint8, (0, self.num_groups - 1))
        if self.has_scale:
            specs["scale"] = TensorSpec((experts, rows), torch.float16)
        if self.has_column_scale:
            specs["column_scale"] = TensorSpec((self.in_features,), torch.float16)
        if self.has_bias:
            specs["bias"] = TensorSpec((experts, rows), torch.float16)
        if self.rank:
            factor = getattr(torch, self.factor_dtype)
            specs["basis"] = TensorSpec((self.rank, self.in_features), factor)
            specs["coefficients"] = TensorSpec((experts, rows, self.rank), factor)
            if self.factor_dtype == "int8":
                specs["basis_scale"] = TensorSpec((self.rank,), torch.float16)
                specs["coefficients_scale"] = TensorSpec((experts, self.rank), torch.float16)
        return specs

    @property
    def num_bytes(self) -> int:
        """Bytes on disk of everything that replaces the weights of this projection."""
        return sum(spec.num_bytes for spec in self.tensors().values())

    @property
    def code_bytes(self) -> int:
        """Bytes on disk of the codes alone."""
        return self.tensors()["codes"].num_bytes

    @property
    def factor_bytes(self) -> int:
        """Bytes on disk of the shared basis and the coefficients."""
        factors = ("basis", "basis_scale", "coefficients", "coefficients_scale")
        return sum(spec.num_bytes for name, spec in self.tensors().items() if name in factors)

    def to_dict(self) -> dict[str, int | str | bool]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class PackedProjection:
    """One quantized projection of a bank: the format and exactly the tensors it lists."""

    format: ProjectionFormat
    tensors: dict[str, Tensor]

    def __post_init__(self) -> None:
        specs = self.format.tensors()
        if specs.keys() != self.tensors.keys():
            raise ConfigError(f"packed tensors {sorted(self.tensors)} do not match the format's {sorted(specs)}")
        for name, spec in specs.items():
            tensor = self.tensors[name]
            if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
                raise ConfigError(
                    f"packed tensor {name} is {tuple(tensor.shape)} {tensor.dtype}, the format says "
                    f"{spec.shape} {spec.dtype}"
                )

    @classmethod
    def from_tensors(
        cls, format: ProjectionFormat, path: str, projection: str, tensors: Mapping[str, Tensor]
    ) -> PackedProjection:
        """The projection of that name of the module at `path`, from the tensors of a checkpoint."""
        return cls(format, {name: tensors[tensor_name(path, projection, name)] for name in format.tensors()})

    def to(self, device: torch.device | str) -> PackedProjection:
        """The same projection with its tensors on `device`."""
        return PackedProjection(self.format, {name: tensor.to(device) for name, tensor in self.tensors.items()})


@dataclass(frozen=True)
class BankFormat:
    """One packed bank of a checkpoint, or one tier of it, as `config.json` records it.

    path: module path in the transformers model, e.g. "model.layers.3.mlp.experts"; of the tiers behind a bank's first
        one, `tier_path`.
    kind: "routed" (called with hidden states, expert indices and routing weights) or "shared" (called
        with hidden states alone).
    experts: of a tier, the experts of the bank that it holds, in ascending order; () for all of them.
    """

    path: str
    kind: str
    gate_up_proj: ProjectionFormat
    down_proj: ProjectionFormat
    experts: tuple[int, ...] = ()

    @property
    def bank(self) -> str:
        """Module path in the original model of the bank that it is, or is a tier of."""
        return bank_path(self.path)

    @property
    def held(self) -> Sequence[int]:
        """The experts of the bank that it holds, in ascending order."""
        return self.experts or range(self.gate_up_proj.num_experts)

    def __post_init__(self) -> None:
        self._check_experts()
        if not isinstance(self.path, str) or not all(part for part in self.path.split(".")):
            raise ConfigError(f"a bank's path must name a module of the model, not {self.path!r}")
        if self.kind not in ("routed", "shared"):
            raise ConfigError(f"{self.path}: kind must be routed or shared, not {self.kind!r}")
        if self.down_proj.has_column_scale and not self.gate_up_proj.has_scale:
            raise ConfigError(
                f"{self.path}: column scales of down_proj need row scales of gate_up_proj to be folded into"
            )

    def _check_experts(self) -> None:
        experts = self.experts
        if not isinstance(experts, tuple) or not all(type(expert) is int and expert >= 0 for expert in experts):
            raise ConfigError(f"{self.path}: experts must be a list of their numbers, not {experts!r}")
        if list(experts) != sorted(set(experts)):
            raise ConfigError(f"{self.path}: experts must be in ascending order, each once, not {experts}")
        if experts and {len(experts)} != {self.gate_up_proj.num_experts, self.down_proj.num_experts}:
            raise ConfigError(f"{self.path}: its projections do not have the {len(experts)} experts that it lists")

    def tensors(self) -> dict[str, TensorSpec]:
        """Every stored tensor by its name in the checkpoint.

        The codes carry the very names of the fused parameters they replace, with another shape: a load
        without `import kbvq` then stops on the mismatch instead of leaving the experts random.
        """
        return {
            tensor_name(self.path, projection, name): spec
            for projection in PROJECTIONS
            for name, spec in getattr(self, projection).tensors().items()
        }

    def to_dict(self) -> dict[str, object]:
        """JSON-ready; `experts` of tiers alone, so that earlier versions read banks that have none."""
        fields = dataclasses.asdict(self)
        experts = list(fields.pop("experts"))
        return fields | ({"experts": experts} if experts else {})

    @classmethod
    def from_dict(cls, data: dict) -> BankFormat:
        """Inverse of `to_dict`; raises ConfigError on unknown or missing fields."""
        try:
            projections = {name: ProjectionFormat(**data[name]) for name in PROJECTIONS}
            experts = data.get("experts", ())
            return cls(**{**data, **projections, "experts": tuple(experts) if isinstance(experts, list) else experts})
        except (TypeError, KeyError) as error:
            raise ConfigError(f"quantization_config describes a bank this version cannot read: {error}") from error


@dataclass(frozen=True)
class PackedBank:
    """One quantized bank: both projections and the place they belong to."""

    path: str
    kind: str
    gate_up_proj: PackedProjection
    down_proj: PackedProjection
    experts: tuple[int, ...] = ()

    @property
    def format(self) -> BankFormat:
        return BankFormat(self.path, self.kind, self.gate_up_proj.format, self.down_proj.format, self.experts)

    def to(self, device: torch.device | str) -> PackedBank:
        """The same bank with its tensors on `device`."""
        return PackedBank(self.path, self.kind, self.gate_up_proj.to(device), self.down_proj.to(device), self.experts)

    def state_dict(self) -> dict[str, Tensor]:
        """The stored tensors by their names in the checkpoint."""
        return {
            tensor_name(self.path, projection, name): tensor
            for projection in PROJECTIONS
            for name, tensor in getattr(self, projection).tensors.items()
        }

    @classmethod
    def from_tensors(cls, format: BankFormat, tensors: Mapping[str, Tensor]) -> PackedBank:
        """Inverse of `state_dict`, from the tensors of many banks."""
        packed = {
            projection: PackedProjection.from_tensors(getattr(format, projection), format.path, projection, tensors)
            for projection in PROJECTIONS
        }
        return cls(format.path, format.kind, **packed, experts=format.experts)


@dataclass(frozen=True)
class MatrixFormat:
    """One packed matrix outside the banks, as `config.json` records it.

    path: module path in the transformers model, e.g. "model.layers.3.self_attn.q_proj".
    kind: "linear" (called with hidden states) or "embedding" (called with token ids).
    weight: a projection of one expert, without bias: that of a Linear stays a parameter of its own.
    tied_head: of an embedding, the path of the Linear that has the same weight, or "" for none.
    """

    path: str
    kind: str
    weight: ProjectionFormat
    tied_head: str = ""

    def __post_init__(self) -> None:
        for name, path in (("path", self.path), ("tied_head", self.tied_head or "none")):
            if not isinstance(path, str) or not all(part for part in path.split(".")):
                raise ConfigError(f"{name} of a matrix must name a module of the model, not {path!r}")
        if self.kind not in ("linear", "embedding"):
            raise ConfigError(f"{self.path}: kind must be linear or embedding, not {self.kind!r}")
        if self.tied_head and self.kind != "embedding":
            raise ConfigError(f"{self.path}: only an embedding has a head that is tied to it")
        if self.weight.num_experts != 1 or self.weight.has_bias or self.weight.has_column_scale:
            raise ConfigError(f"{self.path}: a matrix has one expert, no bias and no column scales")
        if self.weight.codebook == "trellis" and self.kind == "embedding":
            raise ConfigError(f"{self.path}: the rows of a trellis code cannot be decoded one by one")

    def tensors(self) -> dict[str, TensorSpec]:
        """Every stored tensor by its name in the checkpoint; the codes have the name of the weight that they replace,
        as in BankFormat."""
        return {tensor_name(self.path, WEIGHT, name): spec for name, spec in self.weight.tensors().items()}

    def to_dict(self) -> dict[str, object]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> MatrixFormat:
        """Inverse of `to_dict`; raises ConfigError on unknown or missing fields."""
        try:
            return cls(**{**data, "weight": ProjectionFormat(**data["weight"])})
        except (TypeError, KeyError) as error:
            raise ConfigError(f"quantization_config describes a matrix this version cannot read: {error}") from error


@dataclass(frozen=True)
class PackedMatrix:
    """One quantized matrix outside the banks: its format and its weight, a projection of one expert."""

    format: MatrixFormat
    weight: PackedProjection

    @property
    def path(self) -> str:
        return self.format.path

    def state_dict(self) -> dict[str, Tensor]:
        """The stored tensors by their names in the checkpoint."""
        return {tensor_name(self.format.path, WEIGHT, name): tensor for name, tensor in self.weight.tensors.items()}

    @classmethod
    def from_tensors(cls, format: MatrixFormat, tensors: Mapping[str, Tensor]) -> PackedMatrix:
        """Inverse of `state_dict`, from the tensors of many matrices."""
        return cls(format, PackedProjection.from_tensors(format.weight, format.path, WEIGHT, tensors))


def tier_path(bank: str, place: int) -> str:
    """Module path of a tier of the bank at that path: the first one is in its place, the others below it."""
    return f"{bank}.{TIERS}.{place - 1}" if place else bank


def bank_path(path: str) -> str:
    """Module path of the bank that has a tier at `path`, or is there itself."""
    return path.partition(f".{TIERS}.")[0]


def check_tiers(bank: str, num_experts: int, tiers: Sequence[BankFormat]) -> None:
    """Raises ConfigError unless these are the tiers of that bank in their order, and each expert is in one of them."""
    if [tier.path for tier in tiers] != [tier_path(bank, place) for place in range(len(tiers))]:
        raise ConfigError(f"{bank}: its tiers are at {', '.join(tier.path for tier in tiers)}, not one below the other")
    held = sorted(expert for tier in tiers for expert in tier.held)
    if held != list(range(num_experts)):
        raise ConfigError(f"{bank}: its tiers do not hold each of the {num_experts} experts once")


def buffer_name(projection: str, name: str) -> str:
    """Name of a stored tensor inside its bank's module: codes take the projection's own name."""
    return projection if name == "codes" else f"{projection}_{name}"


def tensor_name(path: str, projection: str, name: str) -> str:
    """Name of a stored tensor in the checkpoint."""
    return f"{path}.{buffer_name(projection, name)}"


@dataclass(frozen=True)
class InputMoments:
    """Sums over the tokens that reached each expert, of the inputs of one projection; merged by `+`.

    upper_sum: [num_experts, in_features, in_features] float32, sum of x xᵀ (not mean-centred) in the blocks on and
        above the diagonal; what stands below them counts for nothing until `outer_sum` is asked for.
    input_sum: [num_experts, in_features] float32, sum of x.
    tokens: [num_experts] int64, routed tokens.
    weight_sum: [num_experts] float32, sum of the routing weights of those tokens.
    mass: [num_experts] float32, sum of the weights that the tokens have in the sums above: their number, or the sum of
        their squared routing weights, by which an error of this expert enters the layer's squared output error.

    Each batch is reduced in float32 and the partial sums are added: n additions of like terms cost a
    relative error of about n·2⁻²⁴ at worst, 1e-4 for 2000 batches, far below the sampling error
    1/sqrt(tokens) of the moments themselves.
    """

    upper_sum: Tensor
    input_sum: Tensor
    tokens: Tensor
    weight_sum: Tensor
    mass: Tensor

    @classmethod
    def zeros(
        cls, num_experts: int, in_features: int, device: torch.device | str = "cpu", *, make: MakeZeros = torch.zeros
    ) -> InputMoments:
        """No tokens yet. make: the sums of x xᵀ."""
        return cls(
            make(num_experts, in_features, in_features, device=device),
            torch.zeros(num_experts, in_features, device=device),
            torch.zeros(num_experts, dtype=torch.int64, device=device),
            torch.zeros(num_experts, device=device),
            torch.zeros(num_experts, device=device),
        )

    def __add__(self, other: InputMoments) -> InputMoments:
        return InputMoments(
            self.upper_sum + other.upper_sum,
            self.input_sum + other.input_sum,
            self.tokens + other.tokens,
            self.weight_sum + other.weight_sum,
            self.mass + other.mass,
        )

    def add_(
        self,
        expert: int,
        inputs: Tensor,
        routing_weights: Tensor,
        *,
        by_routing: bool = False,
        token_weights: Tensor | None = None,
    ) -> Tensor:
        """Accumulate, in place, `inputs` [tokens, in_features] of one expert (any float dtype).

        routing_weights: [tokens]. by_routing: weight each token by its squared routing weight instead of by one.
        token_weights: [tokens], further factors. Returns the weights that the tokens had, [tokens] float32.
        """
        for derived in ("outer_sum", "_pooled"):
            self.__dict__.pop(derived, None)
        inputs, routing_weights = inputs.float(), routing_weights.float()
        weights = routing_weights.square() if by_routing else torch.ones_like(routing_weights)
        if token_weights is not None:
            weights = weights * token_weights
        weighted = inputs * weights[:, None]
        own = self.upper_sum[expert]
        for columns in blocks(inputs.shape[1], _COLUMNS):
            own[: columns.stop, columns].addmm_(weighted[:, : columns.stop].T, inputs[:, columns])
        self.input_sum[expert] += weighted.sum(0)
        self.tokens[expert] += len(inputs)
        self.weight_sum[expert] += routing_weights.sum()
        self.mass[expert] += weights.sum()
        return weights

    def reorder_(self, order: Tensor) -> None:
        """Put the channels of each expert in an order of its own; order: [num_experts, in_features] int64."""
        self.__dict__.pop("_pooled", None)
        for outer_sum, input_sum, own in zip(self.outer_sum, self.input_sum, order, strict=True):
            outer_sum.copy_(outer_sum[own][:, own])
            input_sum.copy_(input_sum[own])

    @functools.cached_property
    def outer_sum(self) -> Tensor:
        """[num_experts, in_features, in_features] float32, sum of x xᵀ: upper_sum, completed in place."""
        # The product of a batch has twice the operations that its symmetry leaves; below the diagonal is written once.
        for own in self.upper_sum:
            for columns in blocks(own.shape[1], _COLUMNS):
                own[columns.stop :, columns] = own[columns, columns.stop :].T
        return self.upper_sum

    def pooled_second_moment(self) -> Tensor:
        """E[x xᵀ] over the tokens of all experts, [in_features, in_features] float32; not to be changed."""
        return self._pooled

    @functools.cached_property
    def _pooled(self) -> Tensor:
        """Every expert's moments are shrunk toward it, and the sum reads those of all: kept until they change."""
        # Some rows at a time, so that sums which are not in memory are read once from front to back.
        experts, n, _ = self.outer_sum.shape
        rows = max(1, _SUMMED_AT_ONCE // (experts * n))
        total = torch.cat([self.outer_sum[:, start : start + rows].sum(0) for start in range(0, n, rows)])
        return total / self.mass.sum().clamp_min(_LEAST_MASS)

    def pooled_mean(self) -> Tensor:
        """E[x] over the tokens of all experts, [in_features] float32."""
        return self.input_sum.sum(0) / self.mass.sum().clamp_min(_LEAST_MASS)

    def expert_moments(self, expert: int, prior_tokens: float) -> tuple[Tensor, Tensor]:
        """(E[x xᵀ], E[x]) of one expert, shrunk toward the pooled ones by `prior_tokens` virtual tokens.

        (n_e M_e + n_0 M_pool) / (n_e + n_0), in units of mass: an expert without tokens gets the pooled moments.
        """
        prior = prior_tokens * self.mass.sum() / self.tokens.sum().clamp_min(1)
        total = (self.mass[expert] + prior).clamp_min(_LEAST_MASS)
        return (
            (prior * self.pooled_second_moment()).add_(self.outer_sum[expert]).div_(total),
            (self.input_sum[expert] + prior * self.pooled_mean()) / total,
        )


@dataclass(frozen=True)
class TierMoments:
    """The moments of some experts of a bank, numbered anew; pooled ones, and what experts are shrunk toward, are those
    of the whole bank. No sum is copied."""

    whole: InputMoments
    experts: tuple[int, ...]

    @property
    def tokens(self) -> Tensor:
        return self.whole.tokens[list(self.experts)]

    @property
    def mass(self) -> Tensor:
        return self.whole.mass[list(self.experts)]

    def pooled_second_moment(self) -> Tensor:
        return self.whole.pooled_second_moment()

    def expert_moments(self, expert: int, prior_tokens: float) -> tuple[Tensor, Tensor]:
        return self.whole.expert_moments(self.experts[expert], prior_tokens)


Moments = InputMoments | TierMoments


def blocks(n: int, size: int) -> list[slice]:
    """Of n channels, `size` in each but the last."""
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


_COLUMNS = 256  # in one product of those that are symmetric
_LEAST_MASS = 1e-12
_SUMMED_AT_ONCE = 1 << 28  # numbers
