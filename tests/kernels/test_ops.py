"""The ops on the CPU, compiled and portable, against float64; their registrations; what is served and refused."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from packed_case import random_projection, random_routing, stored_weights

import kbvq_kernels
from kbvq import structures
from kbvq.codes import trellis
from kbvq.codes.levels import levels
from kbvq.recipes import CODES
from kbvq_kernels import build, cpu, ops, prepare, prepared, reference, slower_than_bf16, supports

FORMATS = {
    "vq-d4": {"vector_dim": 4, "rank": 5},
    "vq-d4-12bit": {"vector_dim": 4, "codebook_size": 4096, "has_bias": False},
    "rq2-d8-12bit-int8": {
        "vector_dim": 8, "codebook_size": 4096, "num_stages": 2, "per_expert": True, "rank": 3, "factor_dtype": "int8",
    },
    "rq3-d2": {"vector_dim": 2, "num_stages": 3, "has_scale": False},
    "signed-d8-int8": {"signed": True, "vector_dim": 8, "codebook_dtype": "int8", "rank": 3},
    "signed-d4-int8": {"signed": True, "vector_dim": 4, "codebook_dtype": "int8", "per_expert": True},
    "vq-d4-int8": {"vector_dim": 4, "codebook_dtype": "int8", "rank": 2},
    "vq-d2-int8": {"vector_dim": 2, "codebook_dtype": "int8", "per_expert": True},
    "vq-d4-12bit-int8": {"vector_dim": 4, "codebook_size": 4096, "codebook_dtype": "int8"},
    "signed-d8": {"signed": True, "vector_dim": 8},
    "rq2-d8-int8": {"vector_dim": 8, "num_stages": 2, "codebook_dtype": "int8", "has_scale": False, "rank": 2},
    "rq-grouped3-d8-int8": {
        "codebook": "rq-grouped", "vector_dim": 8, "num_stages": 3, "num_groups": 8, "codebook_dtype": "int8",
        "per_expert": True,
    },
    "rq-grouped2-d4-12bit": {
        "codebook": "rq-grouped", "vector_dim": 4, "num_stages": 2, "num_groups": 3, "codebook_size": 4096,
    },
    "rq-grouped1-d4": {"codebook": "rq-grouped"},
    "trellis-1": {"codebook": "trellis", "codebook_size": 2, "rank": 2},
    "trellis-2": {"codebook": "trellis", "codebook_size": 4},
    "trellis-3": {"codebook": "trellis", "codebook_size": 8},
    "trellis-4": {"codebook": "trellis", "codebook_size": 16},
    "trellis-3-stretched": {"codebook": "trellis", "codebook_size": 8, "tail": 20},
    "trellis-4-stretched": {"codebook": "trellis", "codebook_size": 16, "tail": 22, "rank": 2},
    "far-trellis-4": {"codebook": "trellis", "codebook_size": 16, "tail": 50},
}  # fmt: skip


@pytest.fixture(params=["compiled", "portable"])
def decoder(request, monkeypatch):
    """Both ways to decode on the CPU; a test machine without a compiler would fail here, by name."""
    if request.param == "portable":
        monkeypatch.setattr(cpu, "library", lambda: None)
    else:
        assert cpu.library() is not None, "no C++ compiler"
    return request.param


def moe_projections(options):
    """(tensors, fields) of gate_up and down of a bank of 5 experts."""
    return random_projection(5, 48, 56, **options, seed=1), random_projection(5, 56, 24, **options, seed=2)


def moe_case(options, num_tokens, activation="silu", dtype=torch.float32):
    """(arguments of moe_forward, expected float64 output) of a bank of 5 experts, top 3, with a sentinel index."""
    gate_up, down = moe_projections(options)
    index, weights = random_routing(num_tokens, 3, 5)
    index[-1, -1] = 5
    x = torch.randn(num_tokens, 56, generator=torch.Generator().manual_seed(3)).to(dtype)
    expected = reference.moe_forward(
        x.double(),
        index,
        weights,
        *(reference.dequantize(tensors, **fields) for tensors, fields in (gate_up, down)),
        gate_up[0].get("bias"),
        down[0].get("bias"),
        activation,
    )
    prepared = (prepare(tensors, **fields, dtype=dtype) for tensors, fields in (gate_up, down))
    return (x, index, weights, *prepared, activation), expected


def error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


INTEGER = ("signed-d8-int8", "signed-d4-int8", "vq-d4-int8", "vq-d2-int8", "vq-d4-12bit-int8", "trellis")
"""Beginnings of the formats that a few tokens in 16 bits, rounded to 8, meet in integers."""


@pytest.mark.parametrize("num_tokens", [1, 3, 17])  # 17: more tokens per expert than are multiplied while decoding
@pytest.mark.parametrize("name", FORMATS)
def test_moe_equals_reference(decoder, name, num_tokens):
    arguments, expected = moe_case(FORMATS[name], num_tokens)
    assert error(kbvq_kernels.moe_forward(*arguments), expected) < 1e-6  # float32 sums of at most 56 terms


def rounded_to_8_bits(x, block=32):
    """Rows in blocks of channels, each value a multiple of the block's largest over 127, float64."""
    blocks = F.pad(x, (0, -x.shape[1] % block)).unflatten(1, (-1, block))
    largest = blocks.abs().amax(-1, keepdim=True)
    values = (blocks * (127 / largest)).round().double() * (largest / 127).double()
    return values.flatten(1)[:, : x.shape[1]]


def rounding_error(bits, tail):
    """Of levels in 127ths of the largest, as part of the trellis code's own squared error."""
    return (levels(tail).max().item() / 127) ** 2 / 12 / CODES["trellis"][bits].distortion


def integer_weights(tensors, fields):
    """Stored weights, float64; of a trellis code with its levels in 127ths of the largest, or in 254ths of that."""
    if fields["codebook"] != "trellis":
        return reference.dequantize(tensors, **fields)
    bits = fields["codebook_size"].bit_length() - 1
    codewords = reference.trellis_codewords(bits, fields["tail"]).double()
    unit = codewords.abs().max() / 127 / (254 if rounding_error(bits, fields["tail"]) > cpu.MAX_ROUNDING else 1)
    values = ((codewords / unit).round() * unit)[reference.trellis_states(tensors["codes"], bits)]
    return values.transpose(1, 2) * tensors["scale"].double()[..., None]


def integer_products(x, tensors, fields, expert):
    """What the forward in integers makes of x [1, K], float64 [1, N]: rounded for the codes, as it is for the rest."""
    codes = {name: tensor for name, tensor in tensors.items() if name not in ("basis", "coefficients")}
    out = rounded_to_8_bits(x) @ integer_weights(codes, fields)[expert].T
    if "basis" in tensors:
        low_rank = reference.low_rank_weight(tensors, torch.float64)[expert]
        out = out + x.double() @ (low_rank * tensors["scale"][expert].double()[:, None]).T
    return out + tensors["bias"][expert].double() if "bias" in tensors else out


@pytest.mark.parametrize("name", [name for name in FORMATS if name.startswith(INTEGER)])
def test_moe_in_integers_is_exact_but_for_the_rounding_to_8_bits(name):
    arguments, plain = moe_case(FORMATS[name], 3, dtype=torch.bfloat16)
    x, index, weights = arguments[:3]
    gate_up, down = moe_projections(FORMATS[name])
    expected = torch.zeros(3, 56, dtype=torch.float64)
    for token, slot in (index < 5).nonzero().tolist():
        expert = index[token, slot].item()
        gate, up = integer_products(x[token : token + 1].float(), *gate_up, expert).float().chunk(2, -1)
        expected[token] += weights[token, slot] * integer_products(F.silu(gate) * up, *down, expert)[0]
    actual = kbvq_kernels.moe_forward(*arguments)
    assert error(actual, expected) < 2**-8  # the outputs are bfloat16
    assert error(actual, plain) > 1e-3  # so it was in integers


@pytest.mark.parametrize("many", [0, 100])  # more than are multiplied with what is decoded once, too
@pytest.mark.parametrize("in_features", [24, 160, 200])  # less than a block; half a block and some weights left over
@pytest.mark.parametrize("name", [name for name in FORMATS if name.startswith(INTEGER)])
def test_integer_products_are_exact_but_for_the_rounding_of_x(name, in_features, many):
    """Runs of 1 to 4 tokens and more, rows that fill no tile and several."""
    tensors, fields = random_projection(3, 544, in_features, **FORMATS[name] | {"rank": 0})
    tensors.pop("bias", None)
    prepared, weights = prepare(tensors, **fields), integer_weights(tensors, fields)
    experts = torch.tensor([0, 0, 0, 0, 0, 0, 0, 1, *[1] * many, 2, 2])
    rows = torch.tensor([4, 1, 2, 3, 0, 1, 2, 4, *[0, 1, 2, 3, 4] * (many // 5), 0, 3])
    x = torch.randn(5, in_features, generator=torch.Generator().manual_seed(4))
    expected = torch.einsum("pnk,pk->pn", weights[experts], rounded_to_8_bits(x)[rows])
    assert error(cpu._decode_products(x, rows, experts, prepared, integers=True), expected) < 1e-6


@pytest.mark.parametrize("name", ["signed-d8-int8", "trellis-2"])
def test_many_tokens_are_multiplied_in_integers_where_nothing_is_faster(name, monkeypatch):
    """In one call and in several."""
    arguments, plain = moe_case(FORMATS[name], 60, dtype=torch.bfloat16)
    index, projections, called, products = arguments[1], arguments[3:5], [], cpu._decode_products
    hit, counts = (found.tolist() for found in index[index < 5].unique(return_counts=True))

    def counted(x, rows, experts, p, integers):
        called.append((experts.unique().tolist(), integers))
        return products(x, rows, experts, p, integers)

    monkeypatch.setattr(cpu, "_decode_products", counted)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    whole = kbvq_kernels.moe_forward(*arguments)
    assert called == [(hit, True)] * 2
    assert 1e-3 < error(whole, plain) < 2e-2  # rounded to 8 bits
    called.clear()
    monkeypatch.setattr(cpu, "PAIRS_AT_ONCE", counts[0] + counts[1])
    assert error(kbvq_kernels.moe_forward(*arguments), whole.double()) < 1e-3  # some sums in another order
    assert [experts for experts, _ in called[:2]] == [hit[:2]] * 2 and len(called) > 2
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert cpu.most_tokens(torch.bfloat16, *projections) == cpu.DECODE_TOKENS < min(counts)
    assert error(kbvq_kernels.moe_forward(*arguments), plain) < 1.5e-2
    assert cpu.most_tokens(torch.float32, *projections) == cpu.DECODE_TOKENS


def test_levels_that_8_bits_hold_too_badly_have_16():
    x, experts = torch.randn(3, 40, generator=torch.Generator().manual_seed(4)), torch.arange(3)
    x = rounded_to_8_bits(x).float()
    for name, most in (("trellis-3", 1e-2), ("far-trellis-4", 1e-4)):
        tensors, fields = random_projection(3, 544, 40, **FORMATS[name])
        expected = torch.einsum("pnk,pk->pn", stored_weights(tensors, fields), x.double()) + tensors["bias"].double()
        found = cpu._decode_products(x, experts, experts, prepare(tensors, **fields), integers=True)
        assert error(found, expected) < most
    for bits, tail in itertools.product(cpu.TRELLIS_ERRORS, range(0, structures.MAX_TAIL + 1, 2)):
        rests = cpu._integer_levels(bits, tail)[1]
        assert (rests is None) == (rounding_error(bits, tail) <= cpu.MAX_ROUNDING)
    assert {bits: code.distortion for bits, code in CODES["trellis"].items()} == cpu.TRELLIS_ERRORS


@pytest.mark.parametrize("rows", [24, 328])  # part of what is decoded at once; several blocks and a part
@pytest.mark.parametrize("name", FORMATS)
def test_decoding_into_bfloat16_rounds_what_is_decoded(decoder, name, rows):
    tensors, fields = random_projection(2, rows, 40, **FORMATS[name] | {"rank": 0})
    prepared = prepare(tensors, **fields, dtype=torch.bfloat16)
    buffer = cpu._weight_buffer(prepared, torch.bfloat16)
    for expert in range(2):
        expected = cpu.decode_expert(prepared, expert).bfloat16()
        assert torch.equal(cpu.decode_expert(prepared, expert, buffer), expected)


def test_what_is_not_finite_is_not_lost_in_rounding():
    tensors, fields = random_projection(1, 16, 128, codebook="trellis", codebook_size=4)
    x = torch.zeros(3, 128)
    x[0, 70], x[1, 3] = torch.inf, torch.nan
    places = torch.arange(3), torch.zeros(3, dtype=torch.int64)
    out = cpu._decode_products(x, *places, prepare(tensors, **fields), integers=True)
    assert out[:2].isnan().all() and torch.equal(out[2], tensors["bias"][0].float())


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_every_activation(decoder, activation):
    arguments, expected = moe_case({}, 2, activation)
    assert error(kbvq_kernels.moe_forward(*arguments), expected) < 1e-6


def test_bfloat16_hidden_states(decoder):
    arguments, expected = moe_case(FORMATS["vq-d4"], 17, dtype=torch.bfloat16)
    actual = kbvq_kernels.moe_forward(*arguments)
    assert actual.dtype == torch.bfloat16
    assert error(actual, expected) < 1.5e-2  # weights, h and y rounded to 2^-9


def test_shared_expert_needs_no_routing(decoder):
    gate_up, down = random_projection(1, 48, 56), random_projection(1, 56, 24)
    prepared = [prepare(t, **f) for t, f in (gate_up, down)]
    x = torch.randn(6, 56)
    routed = kbvq_kernels.moe_forward(x, torch.zeros(6, 1, dtype=torch.int64), torch.ones(6, 1), *prepared)
    assert torch.equal(kbvq_kernels.moe_forward(x, None, None, *prepared), routed)
    weights = [reference.dequantize(t, **f) for t, f in (gate_up, down)]
    index, ones = torch.zeros(6, 1, dtype=torch.int64), torch.ones(6, 1)
    expected = reference.moe_forward(x, index, ones, *weights, gate_up[0]["bias"], down[0]["bias"])
    assert error(routed, expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [0, 1, 16, 17])
@pytest.mark.parametrize("name", ["rq3-d2", "vq-d4", "trellis-4"])
def test_linear_equals_reference(decoder, name, num_tokens, dtype):
    tensors, fields = random_projection(1, 48, 56, **FORMATS[name])
    x = torch.randn(num_tokens, 56, generator=torch.Generator().manual_seed(3)).to(dtype)
    actual = kbvq_kernels.linear(x, prepare(tensors, **fields, dtype=dtype))
    assert (actual.dtype, actual.shape) == (dtype, (num_tokens, 48))
    expected = x.double() @ reference.dequantize(tensors, **fields)[0].T
    expected = expected + tensors["bias"].double() if "bias" in tensors else expected
    assert num_tokens == 0 or error(actual, expected) < {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]


def num_rows(name: str) -> int:
    """Rows of a trellis code of 2 or 4 bits may fill no group of 8; streams of 1 and 3 bits need whole groups."""
    return 16 if name.startswith(("trellis-1", "trellis-3")) else 12


@pytest.mark.parametrize("name", FORMATS)
def test_reference_equals_definition_bit_by_bit(name):
    tensors, fields = random_projection(2, num_rows(name), 24, **FORMATS[name])
    assert error(reference.dequantize(tensors, **fields), stored_weights(tensors, fields)) < 1e-12


def test_trellis_is_the_quantizers():
    for bits, factor in trellis.MULTIPLIERS.items():
        code = trellis.TrellisCode(bits, structures.TRELLIS_STATE_BITS)
        for tail in (0, 12, structures.MAX_TAIL):
            stretched = dataclasses.replace(code, tail=tail)
            assert torch.equal(reference.trellis_codewords(bits, tail).float(), stretched.codewords())
        assert reference.MAX_TAIL == structures.MAX_TAIL
        assert reference.TRELLIS_MULTIPLIERS[bits] == factor
        codes = torch.randint(0, 2**bits, (3, 40), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
        states = reference.trellis_states(code.pack(codes), bits)
        assert torch.equal(reference.trellis_codewords(bits, 0).float()[states], code.decode(codes))


@pytest.mark.parametrize("name", FORMATS)
def test_dequantize_equals_reference(decoder, name):
    tensors, fields = random_projection(3, num_rows(name), 48, **FORMATS[name])
    expected = reference.dequantize(tensors, **fields)
    assert error(kbvq_kernels.dequantize(prepare(tensors, **fields)), expected) < 1e-6


def test_reference_on_numbers_done_by_hand():
    """Two vectors of two weights, 12-bit codes 0x102 and 0x003, scale 2, rank one."""
    codebook = torch.zeros(1, 1, 4096, 2, dtype=torch.float16)
    codebook[0, 0, 0x102], codebook[0, 0, 0x003] = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    tensors = {
        "codes": torch.tensor([[[0x02, 0x03, 0x01]]], dtype=torch.uint8),
        "codebook": codebook,
        "scale": torch.tensor([[2.0]]),
        "basis": torch.tensor([[1, 0, 0, 2]], dtype=torch.int8),
        "basis_scale": torch.tensor([0.5]),
        "coefficients": torch.tensor([[[3]]], dtype=torch.int8),
        "coefficients_scale": torch.tensor([[2.0]]),
    }
    weight = reference.dequantize(tensors, codebook="vq", in_features=4, vector_dim=2, codebook_size=4096)
    assert weight.tolist() == [[[2 * (1 + 3), 2 * 2, 2 * 3, 2 * (4 + 6)]]]


def test_codes_are_shared_when_aligned_and_copied_when_not():
    aligned, fields = random_projection(2, 3, 64)
    assert prepare(aligned, **fields).codes.data_ptr() == aligned["codes"].data_ptr()
    ragged, fields = random_projection(2, 3, 52)
    prepared = prepare(ragged, **fields)
    assert prepared.plane == 16 and prepared.codes.shape == (2, 3, 16)


def test_registrations():
    for name in ("vq-d4", "rq2-d8-12bit-int8", "rq-grouped3-d8-int8", "trellis-2"):
        (x, index, weights, gate_up, down, activation), _ = moe_case(FORMATS[name], 3)
        arguments = (
            x, index, weights, gate_up.tensors(), gate_up.numbers(), down.tensors(), down.numbers(), activation,
        )  # fmt: skip
        utilities = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(ops._moe, arguments, test_utils=utilities)
        arguments = (gate_up.tensors(), gate_up.numbers(), torch.float16)
        torch.library.opcheck(ops._dequantize, arguments, test_utils=("test_schema", "test_faketensor"))
    tensors, fields = random_projection(1, 48, 56, vector_dim=2, num_stages=2)
    prepared_linear = prepare(tensors, **fields)
    arguments = (torch.randn(3, 56), prepared_linear.tensors(), prepared_linear.numbers())
    torch.library.opcheck(ops._linear, arguments, test_utils=utilities)


def test_compiles_into_one_graph():
    arguments, expected = moe_case(FORMATS["vq-d4"], 3)
    x, index, weights, gate_up, down, _ = arguments

    @torch.compile(fullgraph=True, backend="aot_eager")
    def layer(x, index, weights):
        return x + kbvq_kernels.moe_forward(2 * x, index, weights, gate_up, down)

    with torch.no_grad():
        actual = layer(x / 2, index, weights)
    assert error(actual - x / 2, expected) < 1e-6


def test_what_is_served_and_refused():
    fields = {"codebook": "vq", "vector_dim": 4, "codebook_size": 256, "num_stages": 1}
    assert supports(**fields) is None
    assert supports(**fields | {"codebook": "rq", "num_stages": 3, "codebook_size": 4096, "rank": 32}) is None
    for change in (
        {"codebook": "lattice"}, {"vector_dim": 16}, {"codebook_size": 65536}, {"num_stages": 2}, {"rank": 1000},
        {"factor_dtype": "float32"}, {"activation": "tanh"}, {"codebook": "rq", "num_stages": 4},
        {"codebook_dtype": "float32"}, {"codebook": "rq", "signed": True}, {"num_groups": 2},
        {"codebook": "rq-grouped", "num_groups": 257},
    ):  # fmt: skip
        assert str(next(iter(change.values()))) in supports(**fields | change)
    tensors, projection = random_projection(1, 2, 8)
    with pytest.raises(ValueError, match="vector_dim 16"):
        prepare(tensors, **projection | {"vector_dim": 16})
    (x, index, weights, gate_up, down, _), _ = moe_case({}, 1)
    with pytest.raises(ValueError, match="activation 'tanh'"):
        kbvq_kernels.moe_forward(x, index, weights, gate_up, down, "tanh")


def test_slower_formats_are_named_once(caplog):
    prepared._warn.cache_clear()
    default = random_projection(1, 16, 16, signed=True, vector_dim=8, codebook_dtype="int8")
    trellis_code = random_projection(1, 16, 16, codebook="trellis", codebook_size=4)
    three_stages = random_projection(1, 16, 16, num_stages=3)
    with caplog.at_level(logging.WARNING):
        for tensors, fields in (default, trellis_code, three_stages, three_stages):
            for device_type in ("cpu", "cuda"):
                prepare(tensors, **fields, device_type=device_type)
    assert [record.args[0] for record in caplog.records] == ["cuda"]
    assert "3 stages" in caplog.text and slower_than_bf16(**default[1]) is None
    two_stages = {"codebook": "rq", "num_stages": 2, "codebook_size": 256}
    assert slower_than_bf16(**two_stages) is None
    assert "4096 codewords" in slower_than_bf16(**two_stages | {"codebook_size": 4096})
    few, many = ({"codebook": "rq-grouped", "num_groups": number} for number in (8, 256))
    assert "2048 codewords" in slower_than_bf16(**two_stages | few)
    assert slower_than_bf16(**two_stages | few, device_type="cpu") is None
    assert "65536 codewords" in slower_than_bf16(**two_stages | many, device_type="cpu")


def test_damaged_codebooks_are_refused():
    for options, value in (({}, -128), ({"signed": True}, -1)):
        tensors, fields = random_projection(1, 16, 16, codebook_dtype="int8", **options)
        tensors["codebook"][0, 0, 3, 1] = value
        with pytest.raises(ValueError, match="damaged"):
            prepare(tensors, **fields)


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({}, {"in_features": 60}, "codes is"),
        ({}, {"in_features": 0}, "in_features"),
        ({"num_stages": 2}, {"num_stages": 3}, "codes is"),
        ({"codebook": "trellis", "codebook_size": 8}, {"codebook_size": 16, "in_features": 32}, "codes is"),
        ({"codebook": "trellis", "codebook_size": 4}, {"codebook_size": 8}, "no whole number of 3-bit codes"),
        ({"rank": 3}, {"rank": 4}, "basis is"),
        ({"codebook": "rq-grouped", "num_stages": 2, "num_groups": 2}, {"num_groups": 3}, "codebook is"),
    ],
)
def test_tensors_of_another_shape_than_the_formats_are_refused(options, change, message):
    tensors, fields = random_projection(2, 16, 64, **options)
    with pytest.raises(ValueError, match=message):
        prepare(tensors, **fields | change)


@pytest.mark.parametrize("name", ["codebook", "scale", "bias", "basis", "coefficients"])
def test_a_tensor_that_is_cut_is_refused(name):
    tensors, fields = random_projection(2, 16, 64, rank=3)
    with pytest.raises(ValueError, match=f"{name} is .*damaged"):
        prepare(tensors | {name: tensors[name][..., :-1].contiguous()}, **fields)


def test_missing_compiler_is_named_in_the_log(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("KBVQ_CACHE", str(tmp_path))
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    cpu.library.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert cpu.library() is None
    assert "no C++ compiler" in caplog.text
    monkeypatch.setattr(build.shutil, "which", lambda name: "/bin/false")
    cpu.library.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert cpu.library() is None
    assert "/bin/false failed" in caplog.text
    cpu.library.cache_clear()


def test_import_touches_neither_cuda_nor_triton():
    code = "import sys, torch, kbvq_kernels; assert 'triton' not in sys.modules and not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(p for p in sys.path if p)})
