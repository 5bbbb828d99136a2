"""Plain residual quantization: encoder, decoder and codebook training against brute force."""

import itertools

import pytest
import torch

from kbvq.codes.residual_quantization import fit_residual_codebooks, residual_decode, residual_encode
from kbvq.errors import ConfigError, NumericalError


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def squared_error(vectors: torch.Tensor, decoded: torch.Tensor) -> torch.Tensor:
    return (vectors.double() - decoded.double()).square().sum(1)


def test_decode_sums_the_codewords_and_reads_prefixes() -> None:
    codebooks, codes = random(3, 5, 4), torch.tensor([[0, 4, 2], [3, 3, 1]], dtype=torch.uint8)
    decoded = residual_decode(codes, codebooks)
    assert torch.equal(decoded[1], codebooks[0, 3] + codebooks[1, 3] + codebooks[2, 1])
    assert torch.equal(residual_decode(codes[:, :1], codebooks)[0], codebooks[0, 0])


def test_greedy_encoding_takes_the_nearest_codeword_of_each_residual() -> None:
    vectors, codebooks = random(50, 4), random(3, 8, 4, seed=1)
    for vector, code in zip(vectors, residual_encode(vectors, codebooks), strict=True):
        for codebook, index in zip(codebooks, code, strict=True):
            distances = (vector - codebook).square().sum(1)
            assert int(distances.argmin()) == int(index)
            vector = vector - codebook[index]


def test_a_beam_as_wide_as_all_partial_sums_finds_the_best_code() -> None:
    vectors, codebooks = random(20, 3), random(3, 4, 3, seed=2)
    combinations = torch.tensor(list(itertools.product(range(4), repeat=3)))
    sums = torch.stack([codebooks[stage, combinations[:, stage]] for stage in range(3)]).sum(0)
    best = torch.cdist(vectors.double(), sums.double()).min(1).values.square()
    found = squared_error(vectors, residual_decode(residual_encode(vectors, codebooks, beam=16), codebooks))
    torch.testing.assert_close(found, best, rtol=1e-5, atol=1e-6)


def test_beam_search_equals_a_reference_written_with_lists() -> None:
    vectors, codebooks = random(30, 4), random(4, 6, 4, seed=3)
    codes = residual_encode(vectors, codebooks, beam=3)
    for vector, code in zip(vectors.double(), codes.tolist(), strict=True):
        partial = [((), torch.zeros(4, dtype=torch.float64))]
        for codebook in codebooks.double():
            grown = [((*path, j), total + codebook[j]) for path, total in partial for j in range(6)]
            partial = sorted(grown, key=lambda item: float((vector - item[1]).square().sum()))[:3]
        assert code == list(partial[0][0])


def test_more_beam_and_more_stages_lower_the_mean_error() -> None:
    vectors = random(2000, 8)
    codebooks = fit_residual_codebooks(vectors, 4, 16, iterations=10, seed=0)
    by_beam = [
        float(squared_error(vectors, residual_decode(residual_encode(vectors, codebooks, beam=beam), codebooks)).mean())
        for beam in (1, 2, 4, 8)
    ]
    assert by_beam == sorted(by_beam, reverse=True)
    codes = residual_encode(vectors, codebooks)
    by_stages = [float(squared_error(vectors, residual_decode(codes[:, :m], codebooks)).mean()) for m in (1, 2, 3, 4)]
    assert by_stages == sorted(by_stages, reverse=True)


def test_codewords_of_a_fit_are_the_means_of_the_residuals_they_serve() -> None:
    # Few vectors and many iterations: k-means has converged, so every codeword is the mean of its cell.
    vectors = random(200, 3)
    codebooks = fit_residual_codebooks(vectors, 2, 4, iterations=200, seed=0)
    codes = residual_encode(vectors, codebooks)
    residual = vectors
    for stage in range(2):
        for index in range(4):
            torch.testing.assert_close(codebooks[stage, index], residual[codes[:, stage] == index].mean(0))
        residual = residual - codebooks[stage, codes[:, stage]]


def test_weights_pull_codewords_toward_heavy_vectors() -> None:
    vectors = torch.tensor([[0.0], [1.0], [10.0]])
    codebook = fit_residual_codebooks(vectors, 1, 2, iterations=20, seed=0, weights=torch.tensor([3.0, 1.0, 1.0]))[0]
    torch.testing.assert_close(codebook.sort(0).values, torch.tensor([[0.25], [10.0]]))


def test_same_seed_same_bytes() -> None:
    vectors = random(500, 4)
    first, second = (fit_residual_codebooks(vectors, 2, 16, iterations=5, seed=7) for _ in range(2))
    assert torch.equal(first, second)


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match="3 < 4"):
        fit_residual_codebooks(random(3, 2), 1, 4, iterations=1, seed=0)
    with pytest.raises(NumericalError, match="NaN"):
        fit_residual_codebooks(torch.full((9, 2), torch.nan), 1, 4, iterations=1, seed=0)
    with pytest.raises(ConfigError, match="beam"):
        residual_encode(random(3, 2), random(1, 4, 2), beam=0)
