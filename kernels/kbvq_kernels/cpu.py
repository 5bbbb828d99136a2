"""The ops on the CPU: compiled decoding where there is a C++ compiler, torch's embedding lookup otherwise.

Both give the same numbers up to float32 rounding. Which one runs is logged once, by name.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kbvq_kernels.prepared import PreparedProjection
from kbvq_kernels.reference import ACTIVATIONS

logger = logging.getLogger(__name__)

FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC", "-std=c++14")

DECODE_TOKENS = 4
"""Up to this many tokens of one expert are multiplied while decoding; above, its rows are decoded once for F.linear."""


def cache_dir() -> Path:
    """$KBVQ_CACHE, else kbvq_kernels below $XDG_CACHE_HOME or ~/.cache."""
    if "KBVQ_CACHE" in os.environ:
        return Path(os.environ["KBVQ_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kbvq_kernels"


def _processor() -> str:
    """What -march=native depends on: a cache shared between machines keeps one library for each kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled decoder, built on first use with $CXX, g++ or c++; None, and a warning, when that cannot be."""
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    if compiler is None:
        logger.warning("kbvq: no C++ compiler found; experts decode with torch.embedding on the CPU (slower)")
        return None
    source = Path(__file__).with_name("cpu_decode.cpp")
    key = hashlib.sha256("\0".join([source.read_text(), compiler, *FLAGS, _processor()]).encode()).hexdigest()[:16]
    path = cache_dir() / f"cpu_decode-{key}.so"
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                built = Path(folder) / "cpu_decode.so"
                command = [compiler, *FLAGS, str(source), "-o", str(built)]
                subprocess.run(command, check=True, capture_output=True, text=True)
                built.replace(path)
        loaded = ctypes.CDLL(str(path))
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", None) or error
        logger.warning("kbvq: experts decode with torch.embedding on the CPU (slower): %s failed: %s", compiler, detail)
        return None
    logger.info("kbvq: experts decode with %s (compiled by %s) on the CPU", path, compiler)
    return loaded


def _address(t: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())


def _longs(*values: int) -> list[ctypes.c_long]:
    return [ctypes.c_long(v) for v in values]


def _format(p: PreparedProjection) -> tuple[int, ...]:
    return (p.out_features, p.num_vectors, p.plane, p.row_bytes, p.vector_dim, p.codebook_size, p.num_stages)


def decode_expert(p: PreparedProjection, expert: int) -> Tensor:
    """decode(codes_e), float32 [N, K]."""
    codes, table = p.codes[expert], p.table[min(expert, p.table.shape[0] - 1)]
    compiled = library()
    if compiled is not None:
        out = torch.empty(p.out_features, p.in_features)
        pointers = _address(codes), _address(table), _address(out)
        compiled.kbvq_decode(*pointers, *_longs(*_format(p), torch.get_num_threads()))
        return out
    weight = None
    for stage, planes in enumerate(codes.unflatten(-1, (p.num_stages, -1)).unbind(-2)):
        code = planes[:, : p.plane].int()
        if p.wide:
            nibbles = planes[:, p.plane :].int()
            code = code | torch.stack([nibbles & 15, nibbles >> 4], -1).flatten(-2) << 8
        part = F.embedding(code[:, : p.num_vectors], table[stage]).flatten(-2)
        weight = part if weight is None else weight.add_(part)
    return weight


def dequantize_expert(p: PreparedProjection, expert: int) -> Tensor:
    """Stored weight of one expert, float32 [N, K]."""
    weight = decode_expert(p, expert)
    if p.rank:
        coefficients = p.coefficients[expert].float()
        if p.factor_scale is not None:
            coefficients = coefficients * p.factor_scale[expert]
        weight.addmm_(coefficients, p.basis.float())
    if p.scale is not None:
        weight.mul_(p.scale[expert].float()[:, None])
    return weight


def dequantize(p: PreparedProjection, dtype: torch.dtype) -> Tensor:
    """Stored weights [E, N, K]."""
    return torch.stack([dequantize_expert(p, e).to(dtype) for e in range(p.num_experts)])


def _decode_products(x: Tensor, experts: Tensor, p: PreparedProjection, pairs_per_x: int) -> Tensor:
    """W_e x + b_e of every pair, float32 [P, N]; x float32 [P / pairs_per_x, K], experts valid int64 [P]."""
    pairs = experts.numel()
    out = torch.empty(pairs, p.out_features)
    rows, vectors, plane, row_bytes, dim, codewords, stages = _format(p)
    sizes = (pairs, pairs_per_x, rows, vectors, plane, row_bytes, dim, codewords, stages)
    library().kbvq_products(
        *(_address(t) for t in (p.codes, p.table, x, experts, out)),
        *_longs(*sizes, p.table.shape[0] > 1, torch.get_num_threads()),
    )
    if p.rank:
        low = (x @ p.basis.float().T).repeat_interleave(pairs_per_x, 0)
        if p.factor_scale is not None:
            low = low * p.factor_scale[experts]
        for pair, e in enumerate(experts.tolist()):
            out[pair].addmv_(p.coefficients[e].float(), low[pair])
    if p.scale is not None:
        out.mul_(p.scale[experts])
    if p.bias is not None:
        out.add_(p.bias[experts])
    return out


def _linear(x: Tensor, p: PreparedProjection, expert: int) -> Tensor:
    y = F.linear(x, dequantize_expert(p, expert).to(x.dtype))
    return y if p.bias is None else y + p.bias[expert].to(x.dtype)


def moe_forward(
    x: Tensor,
    experts: Tensor | None,
    weights: Tensor | None,
    gate_up: PreparedProjection,
    down: PreparedProjection,
    activation: str,
) -> Tensor:
    """The mixture [T, H] in x's dtype; few tokens per expert multiply while decoding, many go through F.linear."""
    num_tokens = x.shape[0]
    if experts is None:
        experts = torch.zeros(num_tokens, 1, dtype=torch.int64)
        weights = torch.ones(num_tokens, 1)
    top_k = experts.shape[1]
    act = ACTIVATIONS[activation]
    flat = experts.reshape(-1)
    valid = (flat >= 0) & (flat < gate_up.num_experts)
    counts = torch.bincount(flat[valid], minlength=gate_up.num_experts)
    rows = torch.zeros(num_tokens * top_k, down.out_features)

    few = valid & (counts[flat.clamp(0, gate_up.num_experts - 1)] <= DECODE_TOKENS)
    if library() is None:
        few = torch.zeros_like(valid)
    if few.any():
        pairs = few.nonzero().squeeze(1)
        hit = flat[pairs].contiguous()
        every = len(pairs) == len(flat)
        inputs = x.float().contiguous() if every else x[pairs // top_k].float()
        gate, up = _decode_products(inputs, hit, gate_up, top_k if every else 1).chunk(2, -1)
        rows[pairs] = _decode_products((act(gate) * up).contiguous(), hit, down, 1)
    many = valid & ~few
    for e in flat[many].unique().tolist():
        pairs = (many & (flat == e)).nonzero().squeeze(1)
        gate, up = _linear(x[pairs // top_k], gate_up, e).chunk(2, -1)
        rows[pairs] = _linear(act(gate) * up, down, e).float()
    weighted = torch.where(valid[:, None], rows * weights.reshape(-1, 1).float(), 0.0)
    return weighted.view(num_tokens, top_k, -1).sum(1).to(x.dtype)
