import pytest
import torch

from kbvq.codes.kmeans import kmeans, nearest_codeword
from kbvq.errors import ConfigError, NumericalError


def brute_force(vectors: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    return (vectors.double()[:, None] - codebook.double()).square().sum(-1)


@pytest.mark.parametrize(("count", "dim", "size"), [(1, 4, 256), (777, 4, 256), (5000, 8, 256), (300, 2, 4096)])
def test_nearest_codeword_is_the_nearest(count, dim, size):
    generator = torch.Generator().manual_seed(count)
    vectors, codebook = torch.randn(count, dim, generator=generator), torch.randn(size, dim, generator=generator)
    distances = brute_force(vectors, codebook)
    chosen = distances.gather(1, nearest_codeword(vectors, codebook)[:, None])[:, 0]
    torch.testing.assert_close(chosen, distances.amin(1), rtol=1e-5, atol=1e-6)


def test_well_separated_clusters_are_found():
    centres = torch.arange(16.0)[:, None] * torch.tensor([10.0, -7.0])
    vectors = centres.repeat_interleave(50, 0) + 0.01 * torch.randn(800, 2, generator=torch.Generator().manual_seed(0))
    codebook = kmeans(vectors, 16, iterations=20, seed=1)
    expected = vectors.view(16, 50, 2).mean(1)
    torch.testing.assert_close(codebook[codebook[:, 0].argsort()], expected, rtol=1e-5, atol=1e-5)


def test_a_fixed_point_is_the_weighted_mean_of_its_cells():
    generator = torch.Generator().manual_seed(3)
    vectors, weights = torch.randn(2000, 4, generator=generator), torch.rand(2000, generator=generator)
    codebook = kmeans(vectors, 32, iterations=1000, seed=0, weights=weights)
    codes = brute_force(vectors, codebook).argmin(1)
    for code in range(32):
        cell = codes == code
        mean = (vectors[cell] * weights[cell, None]).double().sum(0) / weights[cell].double().sum()
        torch.testing.assert_close(codebook[code].double(), mean, rtol=1e-4, atol=1e-5)


def test_unit_gaussian_error_at_two_bits_is_that_of_a_good_quantizer():
    vectors = torch.randn(60_000, 4, generator=torch.Generator().manual_seed(0))
    codebook = kmeans(vectors[:30_000], 256, iterations=30, seed=0)
    held_out = vectors[30_000:]
    error = (held_out - codebook[nearest_codeword(held_out, codebook)]).square().mean()
    # 0.0974 is the known optimum for 256 codewords of dimension 4 (Lloyd-Max scalar: 0.1175).
    assert 0.094 < error < 0.102


def test_same_seed_same_codebook_and_another_seed_another():
    vectors = torch.randn(4000, 4, generator=torch.Generator().manual_seed(0))
    first = kmeans(vectors, 64, iterations=5, seed=7, max_vectors=2000)
    assert torch.equal(first, kmeans(vectors, 64, iterations=5, seed=7, max_vectors=2000))
    assert not torch.equal(first, kmeans(vectors, 64, iterations=5, seed=8, max_vectors=2000))


def test_fewer_distinct_vectors_than_codewords_are_all_represented():
    vectors = torch.tensor([[0.0, 0.0], [1.0, 2.0], [3.0, -1.0]]).repeat(20, 1)
    codebook = kmeans(vectors, 8, iterations=10, seed=0)
    assert torch.isfinite(codebook).all()
    assert brute_force(vectors, codebook).amin(1).max() == 0


def test_zero_vectors_give_a_zero_codebook():
    assert not kmeans(torch.zeros(300, 4), 256, iterations=3, seed=0).any()


def test_bad_vectors_are_refused():
    with pytest.raises(ConfigError, match="100 < 256"):
        kmeans(torch.zeros(100, 4), 256, iterations=1, seed=0)
    bad = torch.zeros(300, 4)
    bad[17, 2] = torch.nan
    with pytest.raises(NumericalError, match="NaN"):
        kmeans(bad, 256, iterations=1, seed=0)
