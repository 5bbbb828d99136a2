"""Whatever the recipes can write the kernels serve: on the CPU as plain torch does, compiled for every card."""

import dataclasses
import warnings

import pytest
import torch
from packed_banks import random_bank
from torch.nn.functional import silu

import kbvq_kernels
from kbvq.models.expert_forward import gated
from kbvq.recipes import CODES, make_recipe
from kbvq.serving.packed_experts import packed_module
from kbvq.structures import PROJECTIONS, ProjectionFormat

EXPERTS, WIDTH = 4, 128
OPTIONS = {
    "default": {},
    "low-rank": {"idre": True, "rank_divisor": 16},
    "as published": {
        "idre": True, "rank_divisor": 16, "factor_dtype": "float16", "codebook_dtype": "float16",
        "codebook_scope": "expert", "row_scale": False, "column_scale": False,
    },
    "float16 codebook": {"codebook_dtype": "float16"},
    "no column scale": {"column_scale": False},
    "no bias": {"bcos": False},
}  # fmt: skip
"""Changes of the recipe default."""


WRITTEN = [
    (codebook, bits, option)
    for codebook, codes in CODES.items()
    for bits in codes
    for option in OPTIONS
    if (codebook, option) != ("rq-moe", "as published")  # it has no network for each expert
]


def written_format(codebook: str, bits: int, option: str) -> ProjectionFormat:
    """What that recipe writes, for a projection with vectors enough for any codebook."""
    recipe = make_recipe("default", 2.0, codebook=codebook, **OPTIONS[option])
    return recipe.projection_format(EXPERTS, WIDTH, WIDTH, bits=bits)


@pytest.mark.parametrize("codebook, bits, option", WRITTEN)
def test_kernels_serve_what_recipes_write(codebook, bits, option):
    """With sums of at most 128 terms in float32, on an expert with many tokens and on others with few."""
    format = written_format(codebook, bits, option)
    assert kbvq_kernels.supports(**format.expanded.to_dict(), activation="silu") is None
    fields = format.to_dict()
    options = {name: v for name, v in fields.items() if name not in ("num_experts", "out_features", "in_features")}
    bank = random_bank("experts", "routed", EXPERTS, WIDTH, WIDTH, seed=1, **options)
    if options["signed"]:
        for projection in PROJECTIONS:
            getattr(bank, projection).tensors["codebook"].abs_()
    generator = torch.Generator().manual_seed(2)
    index = torch.randint(2, EXPERTS, (24, 2), generator=generator)
    index[:, 0] = 1
    inputs = torch.randn(24, WIDTH, generator=generator), index, torch.rand(24, 2, generator=generator)
    plain, served = (packed_module(bank.format, gated(silu), name) for name in (None, "silu"))
    for module in (plain, served):
        module.load_bank_(bank)
    expected = plain(*inputs)
    assert (served(*inputs) - expected).norm() < 1e-5 * expected.norm()


def test_all_that_recipes_write_is_compiled_ahead_of_time():
    """aot.FORMATS, which tests compile for every card, has each code with both types of codebook."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TRITON_DEFAULT_FP_FUSION", UserWarning)
        from kbvq_kernels import aot
    names = ("codebook", "vector_dim", "codebook_size", "num_stages", "num_groups", "signed", "codebook_dtype")
    absent = {field.name: field.default for field in dataclasses.fields(ProjectionFormat)}
    compiled = {tuple((absent | options)[name] for name in names) for options in aot.FORMATS.values()}
    for codebook, bits, option in WRITTEN:
        fields = written_format(codebook, bits, option).expanded.to_dict()
        if fields["num_stages"] == 1 and codebook != "trellis":
            fields["codebook"] = "vq"  # one stage of rq or rq-grouped is no other code
        assert tuple(fields[name] for name in names) in compiled, (codebook, bits, option)
