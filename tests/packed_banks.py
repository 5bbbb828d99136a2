"""Random packed banks and what they decode to, written out independently of `kbvq.codes.packing`."""

import json

import torch

from kbvq.codes.levels import levels
from kbvq.codes.packing import pack_stages
from kbvq.codes.trellis import MULTIPLIERS, TrellisCode
from kbvq.models.moe_adapters import read_experts
from kbvq.serving.packed_experts import packed_module
from kbvq.storage.checkpoint import PackedCheckpointWriter
from kbvq.structures import BankFormat, PackedBank, PackedProjection, ProjectionFormat


def random_projection(format: ProjectionFormat, seed: int) -> tuple[PackedProjection, torch.Tensor]:
    """A projection with random contents, and its codes [num_stages, experts, rows, num_vectors]."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high, *shape):
        return torch.randint(high, shape, generator=generator)

    shape = (format.num_stages, format.num_experts, format.out_features, format.num_vectors)
    codes = draw(format.codebook_size, *shape)
    tensors = {}
    for name, spec in format.tensors().items():
        if name == "codes":
            if format.codebook == "trellis":
                tensors[name] = TrellisCode(format.codebook_size.bit_length() - 1).pack(codes[0].mT)
                continue
            tensors[name] = pack_stages(codes, format.codebook_size)
            if format.signed:
                signs = draw(256, *spec.shape[:2], format.in_features // 8).to(torch.uint8)
                tensors[name] = torch.cat([tensors[name], signs], -1)
        elif name == "groups":
            tensors[name] = draw(format.num_groups, *spec.shape).to(torch.uint8)
        elif spec.dtype == torch.int8:
            values = draw(255, *spec.shape) - 127
            tensors[name] = (values.abs() if format.signed and name == "codebook" else values).to(torch.int8)
        else:
            small = {"codebook": 0.3, "basis_scale": 0.004, "coefficients_scale": 0.004, "codebook_scale": 0.004}
            values = small.get(name, 0.5) * torch.randn(spec.shape, generator=generator)
            magnitudes = name == "codebook_scale" or (format.signed and name == "codebook")
            tensors[name] = (values.abs() if magnitudes else values).to(spec.dtype)
    return PackedProjection(format, tensors), codes


def reference_weight(packed: PackedProjection, codes: torch.Tensor, expert: int) -> torch.Tensor:
    """Stored weight of one expert, [out_features, in_features] float64, value by value from the unpacked codes."""
    format, t = packed.format, packed.tensors
    weight = torch.zeros(format.out_features, format.in_features, dtype=torch.float64)
    book = expert if format.num_codebooks > 1 else 0
    for row in range(format.out_features):
        for vector in range(format.num_vectors):
            columns = slice(vector * format.vector_dim, (vector + 1) * format.vector_dim)
            if format.codebook == "trellis":
                weight[row, vector] = trellis_value(format, codes[0, expert, :, vector].tolist(), row)
                continue
            if format.codebook == "rq-moe":
                weight[row, columns] = rq_moe_vector(format, t, *codes[:, expert, row, vector].tolist())
                continue
            for stage in range(format.num_stages):
                table = stage
                if format.num_groups > 1 and stage:
                    table = 1 + (stage - 1) * format.num_groups + int(t["groups"][book, codes[0, expert, row, vector]])
                codeword = t["codebook"][book, table, codes[stage, expert, row, vector]].double()
                if format.codebook_dtype == "int8":
                    codeword = codeword * t["codebook_scale"][book, table].double()
                weight[row, columns] += codeword
        if format.signed:
            plane = t["codes"][expert, row, -format.in_features // 8 :].tolist()
            for k in range(format.in_features):
                if plane[k // 8] >> k % 8 & 1:
                    weight[row, k] = -weight[row, k]
    if format.rank:
        coefficients, basis = t["coefficients"][expert].double(), t["basis"].double()
        if format.factor_dtype == "int8":
            coefficients = coefficients @ torch.diag(t["coefficients_scale"][expert].double())
            basis = torch.diag(t["basis_scale"].double()) @ basis
        weight = weight + coefficients @ basis
    if format.has_scale:
        weight = torch.diag(t["scale"][expert].double()) @ weight
    if format.has_column_scale:
        weight = weight @ torch.diag(t["column_scale"].double())
    return weight


def rq_moe_vector(format: ProjectionFormat, tensors: dict, first: int, second: int) -> torch.Tensor:
    """The vector of a pair of codes, [d] float64: the equations of RQ-MoE on the stored network."""
    dim, refiners, width = format.vector_dim, 4, 16
    tables = tensors["codebook"][0].double()
    if format.codebook_dtype == "int8":
        tables = tables * tensors["codebook_scale"][0].double()[:, None, None]
    sizes = [2 * dim * dim, 4 * refiners * dim, 4 * refiners * refiners, refiners * width * dim, refiners * width * dim]
    p, g1, g2, b1, b2 = tensors["network"].double().split(sizes)
    u = p.view(dim, 2 * dim) @ torch.cat([tables[1, second], tables[2, first]])
    gates = (g2.view(refiners, -1) @ (g1.view(-1, dim) @ u).clamp(min=0)).softmax(0)
    total = tables[0, first].clone()
    for gate, into, out in zip(gates, b1.view(refiners, width, dim), b2.view(refiners, dim, width), strict=True):
        total += gate * (u + out @ (into @ u).clamp(min=0))
    return total


def trellis_value(format: ProjectionFormat, codes: list[int], row: int) -> float:
    """Value of one row of a column's stream: the code of the row and of those after it, wrapping around."""
    bits = format.codebook_size.bit_length() - 1
    state = sum(codes[(row + i) % len(codes)] << bits * i for i in range(12 // bits))
    return levels(format.tail)[(state * MULTIPLIERS[bits] % 2**32) >> 24].item()


def random_bank(path: str, kind: str, experts: int, hidden: int, intermediate: int, seed: int, **options) -> PackedBank:
    """A bank with random contents; `options` are those of both ProjectionFormats."""
    options = {"codebook": "vq", "vector_dim": 4, "codebook_size": 256} | options
    format = BankFormat(
        path,
        kind,
        ProjectionFormat(experts, 2 * intermediate, hidden, **options),
        ProjectionFormat(experts, hidden, intermediate, **options),
    )
    gate_up, _ = random_projection(format.gate_up_proj, seed)
    down, _ = random_projection(format.down_proj, seed + 1000)
    return PackedBank(path, kind, gate_up, down)


def put_banks_(model, banks):
    """Packed modules with these banks where the model's experts were."""
    for bank in banks:
        experts = read_experts(model.get_submodule(bank.path))
        module = packed_module(bank.format, experts.gating, experts.activation)
        module.load_bank_(bank)
        model.set_submodule(bank.path, module)


def write_packed(source, out, model, banks):
    """The packed checkpoint of `model`, whose experts are the banks; one shard per bank, and one for the rest."""
    formats = [bank.format for bank in banks]
    out.mkdir(parents=True, exist_ok=True)
    writer = PackedCheckpointWriter(out, num_shards=1 + len(banks))
    packed = [bank.state_dict() for bank in banks]
    banked = {name for tensors in packed for name in tensors} | set(model.all_tied_weights_keys)
    others = {k: v for k, v in model.state_dict().items() if k not in banked}
    for index, tensors in enumerate([others, *packed]):
        writer.write_shard(index, tensors)
    config = json.loads((source / "config.json").read_text())
    quantization_config = {
        "quant_method": "kbvq",
        "format_version": 1,
        "kbvq_version": "0",
        "recipe": {"name": "random"},
        "bits_per_weight": 0.0,
        "code_bits": 0.0,
        "banks": [bank.to_dict() for bank in formats],
    }
    writer.finish(config, quantization_config, formats, source, {})
