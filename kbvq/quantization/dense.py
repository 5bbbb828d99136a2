"""The matrices outside the banks, quantized and put in the place of the original ones."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from kbvq.codes.packing import dequantize_expert
from kbvq.errors import NumericalError
from kbvq.method.dense_matrix import quantize_matrix
from kbvq.models.calibration import WatchedLinears
from kbvq.models.ranks import ONE, Ranks
from kbvq.quantization.block_tuning import windows_per_step
from kbvq.structures import MatrixFormat, PackedMatrix

_HEAD_SHARE = 3.0
"""Of the error of a tied matrix as a head, beside its error as an embedding, both as if all directions were alike. A
heuristic: eval/dense_formats.py compares others."""


def tied_moment(of_head: Tensor, share: float = _HEAD_SHARE) -> Tensor:
    """The second moment under which a matrix is coded that is embedding and head, [in_features, in_features]: an
    embedding's error is that of its rows, a head's that of its products with inputs of this second moment."""
    identity = torch.eye(len(of_head), device=of_head.device)
    return identity + share * of_head * (len(of_head) / of_head.trace())


def pack_matrix(
    weight: Tensor, second_moment: Tensor | None, format: MatrixFormat, *, seed: int
) -> tuple[PackedMatrix, dict[str, object]]:
    """The packed matrix on the CPU, and a record for JSON. second_moment: of its inputs; None for an embedding."""
    if second_moment is None:
        second_moment = torch.eye(weight.shape[1], device=weight.device)
    try:
        packed, error = quantize_matrix(
            weight, second_moment, format.weight, seed=seed + zlib.crc32(format.path.encode())
        )
    except NumericalError as failure:
        raise NumericalError(f"{format.path}: {failure}") from failure
    bits = 8 * format.weight.num_bytes / format.weight.num_weights
    record = {"path": format.path, "bits_per_weight": bits, "relative_error": error}
    return PackedMatrix(format, packed.to("cpu")), record


def pack_linears_(
    watched: WatchedLinears, formats: Iterable[MatrixFormat], ranks: Ranks, *, seed: int
) -> tuple[list[PackedMatrix], list[dict[str, object]]]:
    """Quantize Linears for the inputs that were watched; from then on they compute with what is stored.

    formats: of the Linears watched, by their paths. Returns the packed matrices and a record of each.
    """
    packed, records = [], []
    for format in formats:
        module = watched.linears[format.path]
        matrix, record = pack_matrix(
            module.weight.detach(), watched.second_moment(format.path, ranks), format, seed=seed
        )
        module.weight = nn.Parameter(decoded(matrix).to(module.weight.device, module.weight.dtype), requires_grad=False)
        packed.append(matrix)
        records.append(record)
    return packed, records


def pack_whole_(
    model: nn.Module, formats: Sequence[MatrixFormat], token_ids: Tensor, mixed: AbstractContextManager, *, seed: int
) -> tuple[list[PackedMatrix], list[dict[str, object]]]:
    """As `pack_linears_`, all Linears of a model that is in memory as a whole, for the inputs that they get before any
    of them is packed. token_ids: [windows, tokens], which every rank runs. mixed: the precision of the model's forward
    passes, and of nothing else."""
    with WatchedLinears({format.path: model.get_submodule(format.path) for format in formats}) as watched:
        for part in token_ids.split(windows_per_step(token_ids.shape[1], len(token_ids))):
            with mixed:
                model(input_ids=part.to(next(model.parameters()).device), use_cache=False)
    return pack_linears_(watched, formats, ONE, seed=seed)


def decoded(matrix: PackedMatrix) -> Tensor:
    """The weight that is stored, [out_features, in_features] float32 on the CPU."""
    return dequantize_expert(matrix.weight.format, matrix.weight.tensors, 0)
