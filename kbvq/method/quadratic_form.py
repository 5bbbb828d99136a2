"""w H wᵀ of every row of a matrix under a second moment: variances of outputs and weighted errors."""

from __future__ import annotations

import torch
from torch import Tensor

from kbvq.structures import blocks

_BLOCK = 256  # columns of H in one product


def quadratic_forms(rows: Tensor, second_moment: Tensor, mean: Tensor | None = None) -> Tensor:
    """w (H − μ μᵀ) wᵀ of each row w, [n] float32.

    rows: [n, in_features]. second_moment: H, [in_features, in_features] float32, symmetric. mean: μ, [in_features], or
    None for none. As H is symmetric, only the blocks on and above its diagonal are multiplied, those above it counting
    twice: half the operations of W H, and no copy of H. The moment is centred in float64, where the difference of two
    like matrices is harmless; the products that follow have no cancellation.
    """
    rows, second_moment = rows.float(), second_moment.float()
    mean = None if mean is None else mean.double()
    total = rows.new_zeros(len(rows))
    for columns in blocks(rows.shape[1], _BLOCK):
        start, stop = columns.start, columns.stop
        block = second_moment[:stop, columns]
        if mean is not None:
            block = (block.double() - torch.outer(mean[:stop], mean[columns])).float()
        product = (rows[:, :start] @ block[:start]).mul_(2).addmm_(rows[:, columns], block[start:])
        total += product.mul_(rows[:, columns]).sum(1)
    return total
