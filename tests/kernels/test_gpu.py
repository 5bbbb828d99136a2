"""The kernels on a GPU against float64; graphs, compilation and determinism. Run by kernels/bench/gpu.sh."""

from __future__ import annotations

import pytest
import torch
from packed_case import random_projection, random_routing

import kbvq_kernels
from kbvq_kernels import prepare, reference

pytestmark = pytest.mark.gpu

HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32

# Relative error in the Frobenius norm: h, y and (bfloat16) codewords and dot operands rounded once each;
# float32: sums of hundreds of terms, the low-rank part in TF32 (2^-11) on the grouped path.
TOLERANCE = {HALF: 2e-3, BF16: 1.2e-2, FLOAT: 5e-4}

SIGNED = {"signed": True, "codebook_dtype": "int8"}
FORMATS = {
    "signed-d8": SIGNED | {"vector_dim": 8, "rank": 32, "factor_dtype": "int8"},
    "signed-d4": SIGNED | {"vector_dim": 4, "per_expert": True},
    "signed-d8-half": {"signed": True, "vector_dim": 8},
    "vq-d4": {"vector_dim": 4, "rank": 32},
    "vq-d4-int8": {"vector_dim": 4, "codebook_dtype": "int8"},
    "vq-d4-12bit-int8": {"vector_dim": 4, "codebook_size": 4096, "per_expert": True, "rank": 7, "factor_dtype": "int8"},
    "vq-d2-plain": {"vector_dim": 2, "has_scale": False, "has_bias": False},
    "vq-d8-12bit": {"vector_dim": 8, "codebook_size": 4096, "codebook_dtype": "int8"},
    "rq2-d8": {"vector_dim": 8, "num_stages": 2, "rank": 16},
    "rq3-d8": {"vector_dim": 8, "num_stages": 3, "has_bias": False},
    "rq2-d8-12bit": {"vector_dim": 8, "num_stages": 2, "codebook_size": 4096, "codebook_dtype": "int8"},
    "rq-grouped3-d8": {"codebook": "rq-grouped", "vector_dim": 8, "num_stages": 3, "num_groups": 8, "per_expert": True},
    "trellis-2": {"codebook": "trellis", "codebook_size": 4, "rank": 8},
    "trellis-3": {"codebook": "trellis", "codebook_size": 8},
    "trellis-1": {"codebook": "trellis", "codebook_size": 2},
    "trellis-4": {"codebook": "trellis", "codebook_size": 16, "rank": 32, "tail": 20},
}
ODD = (7, 328, 264, 3)  # experts, hidden, intermediate, top_k: rows that fill no tile; 12-bit planes that need padding
WIDE = (16, 512, 384, 4)


# As select_path: F.grouped_mm is graph safe from compute capability 9 on.
PATHS = ["pairs", "blocks", "grouped"]
if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0):
    PATHS.append("scratch")


def on_gpu(tensors, fields, dtype):
    return prepare({name: t.cuda() for name, t in tensors.items()}, **fields, dtype=dtype)


def case(shape, num_tokens, dtype, options, activation="silu"):
    """(arguments of moe_forward on the GPU, expected float64 output)."""
    experts, hidden, intermediate, top_k = shape
    gate_up = random_projection(experts, 2 * intermediate, hidden, **options, seed=1)
    down = random_projection(experts, hidden, intermediate, **options, seed=2)
    index, weights = random_routing(num_tokens, top_k, experts)
    index[-1, -1] = experts + 1
    x = torch.randn(num_tokens, hidden, generator=torch.Generator().manual_seed(3)).to(dtype)
    expected = reference.moe_forward(
        x.double(),
        index,
        weights,
        *(reference.dequantize(tensors, **fields) for tensors, fields in (gate_up, down)),
        gate_up[0].get("bias"),
        down[0].get("bias"),
        activation,
    )
    prepared = [on_gpu(tensors, fields, dtype) for tensors, fields in (gate_up, down)]
    return (x.cuda(), index.cuda(), weights.cuda(), *prepared, activation), expected


def error(actual, expected):
    return ((actual.double().cpu() - expected).norm() / expected.norm()).item()


@pytest.fixture(autouse=True)
def _poison():
    """torch.empty gives NaN: what a kernel forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", FORMATS)
def test_paths_equal_reference(name, path):
    from kbvq_kernels import launch

    for shape, tokens in ((ODD, 5), (WIDE, 40)):
        for dtype in (BF16,) if path == "scratch" else (HALF, BF16):
            arguments, expected = case(shape, tokens, dtype, FORMATS[name])
            if path in ("pairs", "blocks") and not all(launch.decodes(p, dtype) for p in arguments[3:5]):
                assert name.startswith("trellis") and shape is ODD
                continue
            assert error(launch.moe_forward(*arguments, path), expected) < TOLERANCE[dtype], (shape, dtype)


@pytest.mark.parametrize("num_tokens", [1, 2, 8, 33, 300])
def test_chosen_path_equals_reference(num_tokens):
    for dtype in (BF16, FLOAT):
        arguments, expected = case(WIDE, num_tokens, dtype, FORMATS["signed-d8"], "gelu")
        assert error(kbvq_kernels.moe_forward(*arguments), expected) < TOLERANCE[dtype]


def test_shared_expert():
    arguments, _ = case((1, 512, 384, 1), 3, BF16, FORMATS["rq2-d8"])
    x, _, _, gate_up, down, _ = arguments
    for tokens in (1, 3):
        routed = kbvq_kernels.moe_forward(
            x[:tokens], torch.zeros(tokens, 1, dtype=torch.int64, device="cuda"), torch.ones(tokens, 1, device="cuda"),
            gate_up, down,
        )  # fmt: skip
        assert torch.equal(kbvq_kernels.moe_forward(x[:tokens], None, None, gate_up, down), routed)


@pytest.mark.parametrize("tokens", [1, 7, 24, 100])
@pytest.mark.parametrize("options", [{"vector_dim": 2}, {"vector_dim": 2, "num_stages": 2}], ids=["4 bits", "8 bits"])
def test_linear(options, tokens):
    tensors, fields = random_projection(1, 384, 512, **options)
    for dtype in (BF16, HALF, FLOAT):
        x = torch.randn(tokens, 512, generator=torch.Generator().manual_seed(3)).to(dtype)
        actual = kbvq_kernels.linear(x.cuda(), on_gpu(tensors, fields, dtype)).cpu()
        expected = x.double() @ reference.dequantize(tensors, **fields)[0].T + tensors["bias"].double()
        assert error(actual, expected) < TOLERANCE[dtype]


def test_hidden_states_at_any_address():
    """decode_kernel reads 16 bytes at a time; a view may start anywhere."""
    (x, *rest), _ = case(WIDE, 3, BF16, FORMATS["signed-d8"])
    view = torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)
    assert view.data_ptr() % 16 != 0
    assert torch.equal(kbvq_kernels.moe_forward(view, *rest), kbvq_kernels.moe_forward(x, *rest))


def test_dequantize():
    for options in FORMATS.values():
        tensors, fields = random_projection(3, 72, 264, **options)
        # The low-rank part is multiplied in TF32.
        actual = kbvq_kernels.dequantize(on_gpu(tensors, fields, HALF))
        assert error(actual, reference.dequantize(tensors, **fields)) < 1e-3


def test_same_bits_every_time():
    for tokens in (2, 64):
        arguments, _ = case(WIDE, tokens, BF16, FORMATS["signed-d8"])
        first = kbvq_kernels.moe_forward(*arguments)
        assert all(torch.equal(kbvq_kernels.moe_forward(*arguments), first) for _ in range(5))


@pytest.mark.parametrize("num_tokens", [2, 64])
def test_graph_replays_with_new_inputs_and_no_synchronisation(num_tokens):
    torch.use_deterministic_algorithms(False)
    arguments, expected = case(WIDE, num_tokens, BF16, FORMATS["signed-d8"])
    x, index, weights, *rest = arguments
    inputs = [torch.randn_like(x), torch.zeros_like(index), torch.ones_like(weights)]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        kbvq_kernels.moe_forward(*inputs, *rest)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        kbvq_kernels.moe_forward(*inputs, *rest)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = kbvq_kernels.moe_forward(*inputs, *rest)
    for held, new in zip(inputs, (x, index, weights), strict=True):
        held.copy_(new)
    graph.replay()
    assert error(y, expected) < TOLERANCE[BF16]


def test_compiles_into_one_graph():
    torch.use_deterministic_algorithms(False)
    arguments, expected = case(WIDE, 4, BF16, FORMATS["vq-d4"])
    x, index, weights, gate_up, down, _ = arguments
    layer = torch.compile(lambda *a: kbvq_kernels.moe_forward(*a, gate_up, down) * 2, fullgraph=True)
    with torch.no_grad():
        assert error(layer(x, index, weights) / 2, expected) < TOLERANCE[BF16]


def test_codewords_of_another_dtype():
    """A model cast after loading: bfloat16 codewords with float16 hidden states."""
    (x, index, weights, gate_up, down, _), expected = case(WIDE, 24, BF16, FORMATS["vq-d4"])
    for tokens in (1, 24):
        actual = kbvq_kernels.moe_forward(x[:tokens].half(), index[:tokens], weights[:tokens], gate_up, down)
        assert error(actual, expected[:tokens]) < TOLERANCE[BF16]
