"""Recipes: everything that decides how weights become codes, as data."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, fields

from kbvq.errors import ConfigError
from kbvq.structures import ProjectionFormat


@dataclass(frozen=True)
class Code:
    """What codes of one rate are made of: fields of ProjectionFormat, and the mean squared error on unit-Gaussian
    values (eval/codebook_benchmark.py), which tells how an error changes with the rate."""

    vector_dim: int
    codebook_size: int
    distortion: float
    num_stages: int = 1
    signed: bool = False


CODES: dict[str, dict[int, Code]] = {
    "vq": {1: Code(8, 256, 0.325), 2: Code(4, 256, 0.098), 3: Code(4, 4096, 0.0265), 4: Code(2, 256, 0.0081)},
    "sign-vq": {
        1: Code(8, 256, 0.325),
        2: Code(8, 256, 0.0958, signed=True),
        3: Code(4, 256, 0.0267, signed=True),
        4: Code(2, 256, 0.0081),
    },
    "rq": {
        1: Code(8, 256, 0.325),
        2: Code(8, 256, 0.0975, num_stages=2),
        3: Code(8, 256, 0.0289, num_stages=3),
        4: Code(4, 256, 0.0080, num_stages=2),
    },
    "trellis": {1: Code(1, 2, 0.285), 2: Code(1, 4, 0.0693), 3: Code(1, 8, 0.0180), 4: Code(1, 16, 0.0048)},
}
"""Codebook as asked for -> code bits per weight -> code. "sign-vq" is stored as "vq" with sign bits, one stage
of "rq-moe", which has no network, as "vq"."""

CODES["rq-grouped"] = CODES["rq"]
CODES["rq-moe"] = {bits: code for bits, code in CODES["rq"].items() if code.num_stages < 3}
"""A third stage would see 65536 pairs of codes, too many to expand its codewords for each."""

MIN_BITS, MAX_BITS = 1.5, 4.0
"""True bits per weight that a budget can be set to."""

BUDGET_RANKS = (0, 2, 4, 8, 16)
MAX_FACTOR_BITS = 0.1
"""Ranks of the shared basis that a budget chooses from, as long as the factors cost at most so many bits per weight."""

MAX_BASIS_WIDTH = 4096
"""Widest inputs for which a budget considers a shared basis: its eigenvalue problems grow with the cube of the width
and take longer than all the rest of the quantization beyond."""

NUM_GROUPS = 8
"""Groups of the codewords of stage 0 of rq-grouped: its tables then take at most 34 KiB at 2 bits."""


DENSE_BITS = (16, 8, 4)
"""Code bits per weight of the matrices outside the banks; 16 leaves them as they are."""


def dense_format(out_features: int, in_features: int, bits: int) -> ProjectionFormat:
    """How a matrix outside the banks is stored at 8 or 4 code bits: pairs of weights, 4 bits a stage, and row scales.

    Rows are coded and decoded one by one, as an embedding needs them. Raises ConfigError for odd in_features and for a
    matrix so small that with tables and scales it would take 16 bits a weight or more.
    """
    format = ProjectionFormat(
        num_experts=1,
        out_features=out_features,
        in_features=in_features,
        codebook="rq",
        vector_dim=2,
        codebook_size=256,
        num_stages=bits // 4,
        has_scale=True,
    )
    if format.num_bytes >= 2 * format.num_weights:
        raise ConfigError(f"{out_features}x{in_features} weights are too few for tables of {format.codebook_size}")
    return format


@dataclass(frozen=True)
class Recipe:
    """How every bank of a model is quantized.

    bits: with a budget, the bits per expert weight with everything stored, any number from 1.5 to 4; without one, code
        bits per weight (1, 2, 3 or 4), and what is stored beside the codes comes on top.
    budget: choose the code bits of each projection, the rank of its shared basis, and whether it has a bias, for the
        least predicted error within `bits` (planning); otherwise all projections are alike.
    codebook: one of `CODES`.
    codebook_scope: "expert", one codebook per expert and projection as published, or "bank", one that all
        experts of a bank share per projection.
    row_scale: normalise each weight row by its root mean square before it is coded.
    column_scale: normalise the channels too, by the deviation of what error feedback makes of them.
    idre, klt: low-rank structure shared by the experts is split off, in the basis of the input statistics (klt) or
        of a plain SVD.
    rank_divisor: without a budget, rank of the shared basis = in_features / rank_divisor, at least 1 (paper: 128). A
        budget chooses from BUDGET_RANKS.
    factor_dtype, codebook_dtype: storage of basis and coefficients, and of codewords: "float16" or "int8".
    bcos: scale and bias per output channel that restore the teacher's output statistics.
    bcos_part: "both" of them, or the "mean" or the "variance" alone, by the bias or by the scale, for comparisons and
        without a budget.
    error_feedback: code the channels in turn, each for the errors made before it, under the second moments of each
        expert's inputs (error_feedback), with the codebooks refitted `refits` times to the weighted error.
    damping: added to the diagonal of a second moment there, as a fraction of its mean.
    sampling_damping: added beside it, in medians of the diagonal, is so many times channels / tokens of the expert: the
        fewer tokens, the less their correlations are those of other text.
    routing_weighted: a token counts in the moments by its squared routing weight.
    expert_rates: let a budget give experts of a bank different rates, those of one rate being a tier (planning).
    row_importance: how far the bits of a trellis code follow what an error in each output of gate and up costs
        (quantization.row_importance), as a power of it: 0 for not at all, 1 for in full.
    matching: code the weights that give the original's outputs on the quantized model's inputs, instead of the original
        ones, and take back what the residual stream lacks by then (target_weights, quantization.matching).
    tuning_steps: steps of Adam on each layer's output (block_tuning), 0 for none; tuning_rate: their learning rate.
    distillation_steps, distillation_rate: the same for end-to-end tuning of the whole model (distillation); dense_rate:
        that of the decoder layers' dense parameters there, 0 to leave them as they are.
    kmeans_iterations: Lloyd iterations per codebook (paper: 100).
    max_vectors_per_codeword: k-means trains on a random subset of that many vectors per codeword; None for all.
    prior_tokens: virtual tokens by which an expert's moments are shrunk toward the pooled ones.
    few_tokens: experts with fewer routed calibration tokens are counted and reported.
    dense_bits: code bits of the matrices outside the banks, one of DENSE_BITS (dense_format).
    """

    name: str
    bits: float
    budget: bool = False
    codebook: str = "vq"
    codebook_scope: str = "expert"
    row_scale: bool = False
    column_scale: bool = False
    idre: bool = True
    klt: bool = True
    rank_divisor: int = 128
    factor_dtype: str = "float16"
    codebook_dtype: str = "float16"
    bcos: bool = True
    bcos_part: str = "both"
    error_feedback: bool = False
    refits: int = 2
    damping: float = 0.01
    sampling_damping: float = 0.0
    routing_weighted: bool = False
    expert_rates: bool = False
    row_importance: float = 0.0
    matching: bool = False
    tuning_steps: int = 0
    tuning_rate: float = 5e-3
    distillation_steps: int = 0
    distillation_rate: float = 2e-3
    dense_rate: float = 1e-3
    kmeans_iterations: int = 100
    max_vectors_per_codeword: int | None = None
    prior_tokens: float = 32.0
    few_tokens: int = 256
    dense_bits: int = 16

    def __post_init__(self) -> None:
        if self.codebook not in CODES:
            raise ConfigError(f"codebook {self.codebook!r} is not supported; choose one of {', '.join(CODES)}")
        if self.budget and not MIN_BITS <= self.bits <= MAX_BITS:
            raise ConfigError(f"--bits {self.bits} is not supported; choose a number from {MIN_BITS} to {MAX_BITS}")
        if self.codebook == "rq-moe" and not self.budget and self.bits == 3:
            raise ConfigError(
                "--bits 3 with codebook rq-moe needs a third stage, whose codewords cannot be expanded for all 65536 "
                "pairs of codes before it; choose --codebook rq-grouped or another codebook, or a budget, which mixes "
                "2 and 4 bits"
            )
        if self.codebook == "rq-moe" and self.codebook_scope != "bank":
            raise ConfigError(
                "codebook rq-moe has one network for all experts, as each takes megabytes expanded; choose "
                "--codebook-scope bank or another codebook"
            )
        if not self.budget and self.bits not in CODES[self.codebook]:
            raise ConfigError(
                f"--bits {self.bits} is not supported without a budget; choose one of {sorted(CODES[self.codebook])}"
            )
        if self.dense_bits not in DENSE_BITS:
            raise ConfigError(f"--dense-bits {self.dense_bits} is not supported; choose 16, 8 or 4")
        if self.bcos_part not in ("both", "mean", "variance"):
            raise ConfigError(f"bcos_part must be both, mean or variance, not {self.bcos_part!r}")
        if self.bcos_part != "both" and (self.budget or not self.bcos):
            raise ConfigError(f"bcos_part {self.bcos_part} needs bcos, and no budget, which chooses biases by itself")
        if self.column_scale and not self.error_feedback:
            raise ConfigError("column scales are made for error feedback; switch both on or both off")
        if self.codebook == "trellis" and not self.error_feedback:
            raise ConfigError("codebook trellis needs error feedback; choose the recipe fast, default or best")
        if self.expert_rates and self.budget and self.tuning_steps:
            raise ConfigError("tuning_steps do not know rates per expert; set expert_rates=false, or tuning_steps=0")
        if self.codebook_scope not in ("expert", "bank"):
            raise ConfigError(f"codebook_scope must be expert or bank, not {self.codebook_scope!r}")
        if self.factor_dtype not in ("float16", "int8"):
            raise ConfigError(f"factor_dtype must be float16 or int8, not {self.factor_dtype!r}")
        if self.rank_divisor < 1 or self.kmeans_iterations < 1 or self.prior_tokens < 0:
            raise ConfigError("rank_divisor and kmeans_iterations must be at least 1, prior_tokens at least 0")

    def ranks(self, in_features: int) -> tuple[int, ...]:
        """Ranks of the shared basis for inputs of that width: what a budget may choose, or the one there is."""
        if not self.idre:
            return (0,)
        if self.budget:
            affordable = BUDGET_RANKS if in_features <= MAX_BASIS_WIDTH else (0,)
            return tuple(rank for rank in affordable if rank < in_features)
        return (max(1, in_features // self.rank_divisor),)

    def projection_format(
        self,
        num_experts: int,
        out_features: int,
        in_features: int,
        *,
        bits: int | None = None,
        rank: int | None = None,
        bias: bool | None = None,
    ) -> ProjectionFormat:
        """How a projection of that shape is stored with so many code bits per weight, a shared basis of that rank, with
        or without a bias.

        bits, rank, bias: None for what the recipe gives every projection (of several ranks, the first). Raises
        ConfigError when the shape does not suit.
        """
        code = CODES[self.codebook][int(self.bits) if bits is None else bits]
        vectors = out_features * in_features // code.vector_dim * (num_experts if self.codebook_scope == "bank" else 1)
        if vectors < code.codebook_size:
            raise ConfigError(
                f"a {out_features}x{in_features} projection has {vectors} vectors for one codebook of "
                f"{code.codebook_size}; use fewer --bits or --codebook-scope bank"
            )
        grouped = self.codebook == "rq-grouped" and code.num_stages > 1
        trellis = self.codebook == "trellis"
        plain = self.codebook == "sign-vq" or (self.codebook == "rq-moe" and code.num_stages == 1)
        return ProjectionFormat(
            num_experts=num_experts,
            out_features=out_features,
            in_features=in_features,
            codebook="vq" if plain else self.codebook,
            vector_dim=code.vector_dim,
            codebook_size=code.codebook_size,
            num_stages=code.num_stages,
            num_codebooks=num_experts if self.codebook_scope == "expert" and not trellis else 1,
            has_scale=self.row_scale or self.bcos,
            has_bias=self.bcos and self.bcos_part != "variance" if bias is None else bias,
            rank=self.ranks(in_features)[0] if rank is None else rank,
            factor_dtype=self.factor_dtype,
            signed=code.signed,
            codebook_dtype="float16" if trellis else self.codebook_dtype,
            num_groups=NUM_GROUPS if grouped else 1,
            has_column_scale=self.column_scale,
        )

    def candidates(
        self, num_experts: int, out_features: int, in_features: int
    ) -> dict[tuple[int, int], ProjectionFormat]:
        """What a budget chooses from, by code bits and rank; rates that do not suit the shape are left out.

        Raises ConfigError when none is left.
        """
        formats, shape, refusal = {}, (num_experts, out_features, in_features), None
        for bits in CODES[self.codebook]:
            for rank in self.ranks(in_features):
                try:
                    format = self.projection_format(*shape, bits=bits, rank=rank)
                except ConfigError as error:
                    refusal = error
                    continue
                if 8 * format.factor_bytes <= MAX_FACTOR_BITS * format.num_weights:
                    formats[bits, rank] = format
        if not formats and refusal is not None:
            raise refusal
        return formats

    def distortion(self, format: ProjectionFormat) -> float:
        """Mean squared error of a projection's code on unit-Gaussian values; that of the nearest rate."""
        return CODES[self.codebook][round(8 * format.code_bytes / format.num_weights)].distortion

    def to_dict(self) -> dict[str, object]:
        return dataclasses.asdict(self)


_FAST: dict[str, object] = {
    "budget": True,
    "codebook": "sign-vq",
    "codebook_scope": "bank",
    "row_scale": True,
    "column_scale": True,
    "idre": True,
    "factor_dtype": "int8",
    "codebook_dtype": "int8",
    "error_feedback": True,
    "refits": 1,
    "damping": 0.003,
    "sampling_damping": 2.0,
    "routing_weighted": True,
    "matching": True,
    "kmeans_iterations": 20,
    "max_vectors_per_codeword": 64,
    "prior_tokens": 64.0,
    "expert_rates": True,
}

_DEFAULT: dict[str, object] = _FAST | {"codebook": "trellis", "row_importance": 0.7}

_RECIPES: dict[str, dict[str, object]] = {
    "paper": {},
    "fast": _FAST,
    "default": _DEFAULT,
    "best": _DEFAULT | {"distillation_steps": 60},
}

RECIPE_NAMES = tuple(_RECIPES)


def make_recipe(name: str, bits: float, **changes: object) -> Recipe:
    """The recipe of that name at `bits`, with single fields replaced by `changes`.

    "paper": KBVQ-MoE as published. "fast": a bit budget, one codebook with sign bits per bank and projection, row
    scales, second-order error feedback, output correction, and where it pays rates per expert and a shared basis.
    "default": that with a trellis code instead of the codebook, whose bits go to the rows where an error costs most.
    "best": that, and end-to-end tuning on the original model's predictions. Raises ConfigError on an unknown name or an
    unsupported value.
    """
    if name not in _RECIPES:
        raise ConfigError(f"unknown recipe {name!r}; choose one of {', '.join(RECIPE_NAMES)}")
    return Recipe(name=name, bits=bits, **_RECIPES[name] | changes)  # type: ignore[arg-type]


def parse_change(text: str) -> tuple[str, object]:
    """A field of the recipe and its value out of "NAME=VALUE", the value written as in JSON or, a word, as it is.

    Raises ConfigError for what is no field, for a value of another type than the field's default, and for the name and
    the bits, which have options of their own.
    """
    name, _, value = text.partition("=")
    defaults = {field.name: field.default for field in fields(Recipe) if field.name not in ("name", "bits")}
    if name not in defaults:
        raise ConfigError(f"--set {text}: no field of a recipe; choose one of {', '.join(defaults)}")
    try:
        parsed = json.loads(value)
    except ValueError:
        parsed = value
    default = defaults[name]
    wanted = (int, type(None)) if default is None else (int, float) if isinstance(default, float) else (type(default),)
    if not isinstance(parsed, wanted) or (isinstance(parsed, bool) and default is not True and default is not False):
        raise ConfigError(f"--set {text}: {value!r} is no value for {name}, whose default is {default!r}")
    return name, parsed
