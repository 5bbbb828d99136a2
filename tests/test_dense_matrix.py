"""Coding of a matrix outside the banks: against the definition of its error, and without feedback."""

import pytest
import torch
from torch import nn

from kbvq.codes.packing import dequantize_expert, dequantize_rows
from kbvq.errors import ConfigError, NumericalError
from kbvq.method import dense_matrix
from kbvq.method.dense_matrix import quantize_matrix
from kbvq.models.calibration import WatchedLinears
from kbvq.models.ranks import ONE
from kbvq.recipes import dense_format


def problem(rows=160, columns=64, seed=0):
    """Rows of different sizes, and the second moment of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)
    sizes = torch.logspace(0, -2, columns)[:, None]  # of the directions that the inputs have
    inputs = torch.randn(500, columns, generator=generator) @ (
        sizes * torch.randn(columns, columns, generator=generator)
    )
    return weight, inputs.T @ inputs / 500


def error(weight, quantized, moment):
    lost = (weight - quantized).double()
    return (
        torch.trace(lost @ moment.double() @ lost.T)
        / torch.trace(weight.double() @ moment.double() @ weight.double().T)
    ).item()


@pytest.mark.parametrize(("bits", "limit"), [(8, 4e-4), (4, 2e-2)])
def test_error_is_what_it_says_and_feedback_pays(bits, limit):
    weight, moment = problem()
    format = dense_format(*weight.shape, bits)
    packed, found = quantize_matrix(weight, moment, format, seed=0)
    decoded = dequantize_expert(format, packed.tensors, 0)
    assert found == pytest.approx(error(weight, decoded, moment), rel=2e-2)  # the scale is rounded to float16 after it
    plain, _ = quantize_matrix(weight, torch.eye(len(moment)), format, seed=0)
    assert found < limit
    assert found < 0.5 * error(weight, dequantize_expert(format, plain.tensors, 0), moment)


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_are_coded_and_decoded_one_by_one(bits, monkeypatch):
    weight, moment = problem()
    weight[5] = 0
    format = dense_format(*weight.shape, bits)
    whole, _ = quantize_matrix(weight.bfloat16(), moment, format, seed=0)
    monkeypatch.setattr(dense_matrix, "WEIGHTS_AT_A_TIME", 7 * weight.shape[1])
    parts, _ = quantize_matrix(weight.bfloat16(), moment, format, seed=0)
    assert (whole.tensors["codes"] != parts.tensors["codes"]).float().mean() < 1e-2  # sums in another order
    decoded = dequantize_expert(format, whole.tensors, 0)
    assert not decoded[5].any()
    rows = torch.tensor([5, 0, 159, 0])
    assert torch.equal(dequantize_rows(format, whole.tensors, rows), decoded[rows])


def test_extreme_and_unsuitable_weights_are_refused():
    weight, moment = problem()
    with pytest.raises(NumericalError, match="range of float16"):
        quantize_matrix(weight * 1e6, moment, dense_format(*weight.shape, 8), seed=0)
    with pytest.raises(ConfigError, match="16x8 weights are too few"):
        dense_format(16, 8, 4)
    with pytest.raises(ConfigError, match="in_features 63"):
        dense_format(500, 63, 4)


def test_watched_inputs_are_summed_once_for_those_that_share_them():
    generator = torch.Generator().manual_seed(0)
    linears = {name: nn.Linear(6, 4) for name in ("q", "k", "o", "unused")}
    batches = [torch.randn(2, 5, 6, generator=generator) for _ in range(3)]
    with WatchedLinears(linears) as watched, torch.no_grad():
        for batch in batches:
            linears["q"](batch)
            linears["k"](batch)
            linears["o"](2 * batch)
    linears["q"](torch.ones(1, 6))  # behind the block: not counted
    inputs = torch.cat(batches).flatten(0, 1).double()
    expected = (inputs.T @ inputs / len(inputs)).float()
    torch.testing.assert_close(watched.second_moment("q", ONE), expected)
    assert torch.equal(watched.second_moment("k", ONE), watched.second_moment("q", ONE))
    torch.testing.assert_close(watched.second_moment("o", ONE), 4 * expected)
    assert torch.equal(watched.second_moment("unused", ONE), torch.eye(6))
