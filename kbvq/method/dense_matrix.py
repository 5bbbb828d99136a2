"""A matrix outside the banks, from weights and statistics to the packed form: second order, its rows a part at a time.

Attention, dense MLPs, embeddings and the head have few of a mixture's weights and take more bits: 4 or 8, as pairs of
weights and one or two stages of 256 codewords. Nothing is split off and no outputs are corrected: at these rates error
feedback under the second moment of the inputs leaves less than a thousandth of the outputs' energy. The stages before
the last take the nearest codeword; the last one has the feedback, which is as good as to choose all of them together
where they are this fine. Rows do not depend on each other, so a head of a hundred thousand rows is coded in parts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kbvq.codes.codebooks import TableCodebook
from kbvq.codes.kmeans import nearest_codeword
from kbvq.codes.packing import dequantize_expert, pack_stages, store_tables, table_values
from kbvq.codes.residual_quantization import fit_residual_codebooks
from kbvq.errors import NumericalError
from kbvq.method.error_feedback import channel_order, encode_with_feedback, upper_factor
from kbvq.method.rate_distortion import weighted_error
from kbvq.method.vector_quantization import row_scales, row_slopes
from kbvq.structures import PackedProjection, ProjectionFormat

_DAMPING = 0.003  # as in the recipes
_ITERATIONS = 20  # of k-means
_TRAINED_ON = 64 * 256  # vectors that k-means sees
WEIGHTS_AT_A_TIME = 1 << 24
"""Weights of the rows that are coded together."""


def quantize_matrix(
    weight: Tensor, second_moment: Tensor, format: ProjectionFormat, *, seed: int
) -> tuple[PackedProjection, float]:
    """The packed matrix, and its weighted error relative to its energy: tr(Δ H Δᵀ) / tr(W H Wᵀ), Δ = W − Ŵ.

    weight: [out_features, in_features] of any float dtype. second_moment: H = E[x xᵀ] of its inputs, [in_features,
    in_features] float32 on the same device, without a unit; the identity where any input is as likely as any other, as
    in an embedding. format: of `recipes.dense_format`. seed: of the sample that the tables are trained on.
    Raises NumericalError when a stored value leaves the range of float16 or the moment cannot be factorised.
    """
    dim = format.vector_dim
    order = channel_order(second_moment, dim)
    vector_order = (order[::dim] // dim).argsort()
    factor = upper_factor(second_moment[order][:, order], _DAMPING)[None]
    scale = torch.cat([row_scales(part.float()) for part in _parts(weight)])
    _check_finite("scale", scale)
    tensors = store_tables(_fit_tables(weight, scale, format, seed)[None], format.codebook_dtype)
    *first, last = table_values(tensors)[0]
    codebook = TableCodebook(dataclasses.replace(format, num_stages=1), last[None, None])
    codes, scales = [], []
    error = energy = 0.0
    for part, own_scale in zip(_parts(weight), scale.split(_rows_at_a_time(weight)), strict=True):
        own = part.float()
        stages = []
        residual = own / own_scale[:, None]
        for table in first:
            nearest = nearest_codeword(residual.view(-1, dim), table)
            residual = residual - F.embedding(nearest, table).view_as(residual)
            stages.append(nearest.view(len(own), -1))
        left = (residual * own_scale[:, None])[None][..., order]
        stages.append(encode_with_feedback(left, factor, codebook, own_scale[None])[0, 0][:, vector_order])
        of_part = {"codes": pack_stages(torch.stack(stages), format.codebook_size)[None]}
        codes.append(of_part["codes"])
        own_scale = own_scale * own.any(-1)  # not every code has a codeword of zeros for a row of zeros
        of_part["scale"] = own_scale[None]
        quantized = dequantize_expert(format, tensors | of_part, 0)
        slope = row_slopes(own, quantized, second_moment)
        scales.append((own_scale * slope).half())
        error += len(own) * weighted_error(own - quantized * slope[:, None], second_moment)
        energy += len(own) * weighted_error(own, second_moment)
    tensors |= {"codes": torch.cat(codes, 1), "scale": torch.cat(scales)[None]}
    for name, tensor in tensors.items():
        _check_finite(name, tensor)
    return PackedProjection(format, tensors), error / energy if energy else 0.0


def _check_finite(name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise NumericalError(f"{name} leaves the range of float16; the weights are extreme")


def _rows_at_a_time(weight: Tensor) -> int:
    return max(1, WEIGHTS_AT_A_TIME // weight.shape[1])


def _parts(weight: Tensor) -> Iterator[Tensor]:
    return iter(weight.split(_rows_at_a_time(weight)))


def _fit_tables(weight: Tensor, scale: Tensor, format: ProjectionFormat, seed: int) -> Tensor:
    """Tables of all stages by k-means on a sample of the scaled vectors, [num_stages, codebook_size, d] float32; a row
    of scale s counts s² times."""
    vectors = weight.reshape(-1, format.vector_dim)
    chosen = torch.arange(len(vectors))
    if len(vectors) > _TRAINED_ON:
        chosen = torch.randint(len(vectors), (_TRAINED_ON,), generator=torch.Generator().manual_seed(seed))
    chosen = chosen.to(weight.device)
    of_row = scale[chosen // format.num_vectors]
    return fit_residual_codebooks(
        vectors[chosen].float() / of_row[:, None],
        format.num_stages,
        format.codebook_size,
        iterations=_ITERATIONS,
        seed=seed,
        weights=of_row.square(),
    )
