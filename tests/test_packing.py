import pytest
import torch
from packed_banks import random_projection, reference_weight

from kbvq.codes.packing import dequantize_expert, pack_codes, pack_stages, unpack_codes, unpack_stages
from kbvq.errors import ConfigError
from kbvq.structures import ProjectionFormat


def test_byte_layout_of_twelve_bit_codes():
    packed = pack_codes(torch.tensor([[0x123, 0xFED, 0xA05]]), 4096)
    assert packed.tolist() == [[0x23, 0xED, 0x05, 0xF1, 0x0A]]


def test_byte_layout_of_eight_bit_codes():
    assert pack_codes(torch.tensor([[7, 255, 0]]), 256).tolist() == [[7, 255, 0]]


@pytest.mark.parametrize("codebook_size", [256, 4096])
@pytest.mark.parametrize("num_vectors", [1, 2, 7, 16])
def test_unpack_inverts_pack(codebook_size, num_vectors):
    generator = torch.Generator().manual_seed(num_vectors)
    codes = torch.randint(codebook_size, (3, 5, num_vectors), generator=generator)
    codes[0, 0, 0], codes[-1, -1, -1] = codebook_size - 1, codebook_size - 1
    assert torch.equal(unpack_codes(pack_codes(codes, codebook_size), num_vectors, codebook_size).long(), codes)


@pytest.mark.parametrize("codebook_size", [256, 4096])
@pytest.mark.parametrize("num_vectors", [5, 8])
def test_unpack_stages_inverts_pack_stages_in_the_formats_row_bytes(codebook_size, num_vectors):
    codes = torch.randint(codebook_size, (3, 2, 4, num_vectors), generator=torch.Generator().manual_seed(0))
    packed = pack_stages(codes, codebook_size)
    format = ProjectionFormat(2, 4, 4 * num_vectors, "rq", 4, codebook_size, num_stages=3)
    assert (packed.shape, packed.dtype) == (format.tensors()["codes"].shape, torch.uint8)
    assert torch.equal(unpack_stages(packed, 3, num_vectors, codebook_size).long(), codes)


@pytest.mark.parametrize("code", [-1, 256])
def test_code_outside_the_codebook_is_refused(code):
    with pytest.raises(ConfigError, match=rf"\[{min(code, 0)}, {max(code, 0)}\]"):
        pack_codes(torch.tensor([0, code]), 256)


def test_codebook_size_without_packing_is_refused():
    with pytest.raises(ConfigError, match="codebook_size 512"):
        pack_codes(torch.zeros(4, dtype=torch.long), 512)
    with pytest.raises(ConfigError, match="codebook_size 512"):
        unpack_codes(torch.zeros(4, dtype=torch.uint8), 4, 512)


FORMATS = {
    "plain": {"codebook": "vq", "vector_dim": 4, "codebook_size": 256},
    "codebook per expert, 12 bit, odd": {"codebook": "vq", "vector_dim": 8, "codebook_size": 4096, "num_codebooks": 3},
    "two stages, scale": {
        "codebook": "rq", "vector_dim": 8, "codebook_size": 256, "num_stages": 2, "has_scale": True,
    },
    "float16 factors": {
        "codebook": "vq", "vector_dim": 4, "codebook_size": 4096, "has_scale": True, "has_bias": True, "rank": 3,
    },
    "int8 factors": {"codebook": "vq", "vector_dim": 4, "codebook_size": 256, "rank": 5, "factor_dtype": "int8"},
}  # fmt: skip


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS.keys())
def test_dequantize_is_the_stored_weight(options):
    format = ProjectionFormat(3, 10, 40, **options)
    packed, codes = random_projection(format, seed=1)
    for expert in range(3):
        expected = reference_weight(packed, codes, expert)
        actual = dequantize_expert(format, packed.tensors, expert)
        assert (actual.dtype, actual.shape) == (torch.float32, (10, 40))
        # Sums of at most 8 float32 products of order one; the reference is float64.
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-5)


def test_dequantize_computes_in_float32_whatever_the_buffers_were_cast_to():
    format = ProjectionFormat(3, 10, 40, **FORMATS["int8 factors"], has_scale=True)
    packed, _ = random_projection(format, seed=2)
    cast = {k: t.double() if t.is_floating_point() else t for k, t in packed.tensors.items()}
    expected = dequantize_expert(format, packed.tensors, 1)
    assert torch.equal(dequantize_expert(format, cast, 1), expected)
    assert torch.equal(dequantize_expert(format, cast, 1, torch.bfloat16), expected.bfloat16())
