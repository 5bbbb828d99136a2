"""Recipes: everything that decides how weights become codes, as data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from kbvq.errors import ConfigError
from kbvq.structures import ProjectionFormat

BITS = {2: (4, 256), 3: (4, 4096), 4: (2, 256)}
"""Code bits per weight -> (vector_dim, codebook_size)."""


@dataclass(frozen=True)
class Recipe:
    """How every bank of a model is quantized.

    bits: code bits per weight; one of `BITS`. What is stored beside the codes comes on top.
    codebook_scope: "expert", one codebook per expert and projection as published, or "bank", one that all
        experts of a bank share per projection.
    row_scale: normalise each weight row by its root mean square before it is coded.
    idre, klt: low-rank structure shared by the experts is split off, in the basis of the input statistics (klt) or
        of a plain SVD.
    rank_divisor: rank of the shared basis = in_features / rank_divisor, at least 1 (paper: 128).
    factor_dtype: storage of basis and coefficients, "float16" or "int8".
    bcos: scale and bias per output channel that restore the teacher's output statistics.
    error_feedback: code the channels in turn, each for the errors made before it, under the second moments of each
        expert's inputs (error_feedback), with the codebooks refitted `refits` times to the weighted error.
    damping: added to the diagonal of a second moment there, as a fraction of its mean.
    routing_weighted: a token counts in the moments by its squared routing weight.
    tuning_steps: steps of Adam on each layer's output (block_tuning), 0 for none; tuning_rate: their learning rate.
    kmeans_iterations: Lloyd iterations per codebook (paper: 100).
    max_vectors_per_codeword: k-means trains on a random subset of that many vectors per codeword; None for all.
    prior_tokens: virtual tokens by which an expert's moments are shrunk toward the pooled ones.
    few_tokens: experts with fewer routed calibration tokens are counted and reported.
    """

    name: str
    bits: int
    codebook: str = "vq"
    codebook_scope: str = "expert"
    row_scale: bool = False
    idre: bool = True
    klt: bool = True
    rank_divisor: int = 128
    factor_dtype: str = "float16"
    bcos: bool = True
    error_feedback: bool = False
    refits: int = 2
    damping: float = 0.01
    routing_weighted: bool = False
    tuning_steps: int = 0
    tuning_rate: float = 5e-3
    kmeans_iterations: int = 100
    max_vectors_per_codeword: int | None = None
    prior_tokens: float = 32.0
    few_tokens: int = 256

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ConfigError(f"--bits {self.bits} is not supported; choose one of {sorted(BITS)}")
        if self.codebook != "vq":
            raise ConfigError(f"codebook {self.codebook!r} is not supported; choose vq")
        if self.codebook_scope not in ("expert", "bank"):
            raise ConfigError(f"codebook_scope must be expert or bank, not {self.codebook_scope!r}")
        if self.factor_dtype not in ("float16", "int8"):
            raise ConfigError(f"factor_dtype must be float16 or int8, not {self.factor_dtype!r}")
        if self.rank_divisor < 1 or self.kmeans_iterations < 1 or self.prior_tokens < 0:
            raise ConfigError("rank_divisor and kmeans_iterations must be at least 1, prior_tokens at least 0")

    @property
    def vector_dim(self) -> int:
        return BITS[self.bits][0]

    @property
    def codebook_size(self) -> int:
        return BITS[self.bits][1]

    def rank(self, in_features: int) -> int:
        """Rank of the shared basis for inputs of that width; 0 without IDRE."""
        return max(1, in_features // self.rank_divisor) if self.idre else 0

    def projection_format(self, num_experts: int, out_features: int, in_features: int) -> ProjectionFormat:
        """How a projection of that shape will be stored; known before any weight is read.

        Raises ConfigError when the shape does not suit the recipe.
        """
        vectors = out_features * in_features // self.vector_dim * (num_experts if self.codebook_scope == "bank" else 1)
        if vectors < self.codebook_size:
            raise ConfigError(
                f"a {out_features}x{in_features} projection has {vectors} vectors for one codebook of "
                f"{self.codebook_size}; use fewer --bits or --codebook-scope bank"
            )
        return ProjectionFormat(
            num_experts=num_experts,
            out_features=out_features,
            in_features=in_features,
            codebook=self.codebook,
            vector_dim=self.vector_dim,
            codebook_size=self.codebook_size,
            num_codebooks=num_experts if self.codebook_scope == "expert" else 1,
            has_scale=self.row_scale or self.bcos,
            has_bias=self.bcos,
            rank=self.rank(in_features),
            factor_dtype=self.factor_dtype,
        )

    def to_dict(self) -> dict[str, object]:
        return dataclasses.asdict(self)


_DEFAULT: dict[str, object] = {
    "codebook_scope": "bank",
    "row_scale": True,
    "idre": False,
    "factor_dtype": "int8",
    "error_feedback": True,
    "refits": 3,
    "routing_weighted": True,
    "kmeans_iterations": 20,
    "max_vectors_per_codeword": 64,
    "prior_tokens": 256.0,
}

_RECIPES: dict[str, dict[str, object]] = {
    "paper": {},
    "default": _DEFAULT,
    "best": _DEFAULT | {"tuning_steps": 100},
}

RECIPE_NAMES = tuple(_RECIPES)


def make_recipe(name: str, bits: int, **changes: object) -> Recipe:
    """The recipe of that name at `bits`, with single fields replaced by `changes`.

    "paper": KBVQ-MoE as published. "default": one codebook per bank and projection, row scales, second-order error
    feedback, output correction. "best": that, and tuning on each layer's output.
    Raises ConfigError on an unknown name or an unsupported value.
    """
    if name not in _RECIPES:
        raise ConfigError(f"unknown recipe {name!r}; choose one of {', '.join(RECIPE_NAMES)}")
    return dataclasses.replace(Recipe(name=name, bits=bits), **_RECIPES[name] | changes)  # type: ignore[arg-type]
