import pytest
import torch

from kbvq.codes.codebooks import TableCodebook, TrellisCodebook
from kbvq.errors import NumericalError
from kbvq.method.error_feedback import (
    channel_order,
    encode_with_feedback,
    error_passing,
    simulated_target_variances,
    target_variances,
    upper_factor,
)
from kbvq.method.vector_quantization import expert_factor
from kbvq.recipes import make_recipe
from kbvq.structures import ProjectionFormat
from kbvq_kernels import encode as compiled

EXPERTS, OUT, IN, DIM, SIZE = 2, 40, 150, 2, 256


@pytest.fixture(params=["compiled", "torch"])
def search(request, monkeypatch):
    """Both ways through a block; a test machine without a compiler would fail here, by name."""
    if request.param == "torch":
        monkeypatch.setattr(compiled, "feedback_library", lambda: None)
    else:
        assert compiled.feedback_library() is not None, "no C++ compiler"


def problem(seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(EXPERTS, OUT, IN, generator=generator)
    roots = torch.randn(EXPERTS, IN, IN, generator=generator) * torch.logspace(0, -1, IN)
    codebook = torch.randn(1, SIZE, DIM, generator=generator).half().float()
    scale = 0.5 + torch.rand(EXPERTS, OUT, generator=generator)
    return weights, roots @ roots.mT / IN, codebook, scale


def book(codebooks):
    format = ProjectionFormat(EXPERTS, OUT, IN, "vq", DIM, SIZE, num_codebooks=len(codebooks))
    return TableCodebook(format, codebooks[:, None])


def encode(weights, factor, codebooks, scale):
    return encode_with_feedback(weights, factor, book(codebooks), scale)[0]


def encode_and_refit(weights, factor, codebooks, scale):
    codebook = book(codebooks)
    refit = codebook.refit()
    codes = encode_with_feedback(weights, factor, codebook, scale, refit)[0]
    return codes, refit.solve().tables[:, 0]


def decode(codes, codebooks, scale):
    decoded = torch.stack([book[code] for code, book in zip(codes, codebooks.expand(EXPERTS, -1, -1), strict=True)])
    return scale[..., None] * decoded.flatten(-2)


def weighted_error(difference, moments):
    return torch.einsum("eoi,eij,eoj->", difference.double(), moments.double(), difference.double())


def test_factor_is_upper_triangular_and_squares_to_the_damped_moment():
    _, moments, _, _ = problem()
    factor = upper_factor(moments, 0.01)
    assert torch.equal(factor, factor.triu())
    mean = moments.diagonal(dim1=-2, dim2=-1).mean(-1)
    damped = moments.double() + 0.01 * mean[:, None, None].double() * torch.eye(IN)
    torch.testing.assert_close(factor.double() @ factor.double().mT, damped, rtol=1e-4, atol=1e-5)


def test_a_massive_channel_does_not_decide_the_damping_against_sampling_error():
    _, moments, _, _ = problem()
    massive = moments.clone()
    massive[:, 0, 0] += 1e4 * moments.diagonal(dim1=-2, dim2=-1).mean()
    added = upper_factor(massive, 0.0, 0.5).double()
    median = massive.diagonal(dim1=-2, dim2=-1).sort(-1).values[:, (IN - 1) // 2]
    expected = massive.double() + 0.5 * median[:, None, None].double() * torch.eye(IN)
    torch.testing.assert_close(added @ added.mT, expected, rtol=1e-4, atol=1e-5)


def test_damping_by_the_number_of_tokens_lowers_the_error_on_other_tokens():
    """Twice as many tokens as channels."""
    generator = torch.Generator().manual_seed(1)
    weights, _, codebook, scale = problem()
    roots = torch.randn(EXPERTS, IN, 4 * IN, generator=generator) * torch.logspace(0, -1, 4 * IN)
    moments, tokens = roots @ roots.mT / IN, 2 * IN
    mixing = torch.linalg.cholesky(moments)
    inputs = torch.randn(EXPERTS, tokens, IN, generator=generator) @ mixing.mT
    sampled = inputs.mT @ inputs / tokens

    def error(**damping):
        recipe = make_recipe("fast", 2, **damping)
        factor = torch.stack([expert_factor(moment, tokens, recipe) for moment in sampled])
        codes = encode(weights, factor, codebook, scale)
        return weighted_error(weights - decode(codes, codebook, scale), moments)

    assert error() < 0.93 * error(sampling_damping=0.0)


def test_an_expert_without_tokens_is_damped_within_bounds():
    recipe = make_recipe("fast", 2)
    _, moments, _, _ = problem()
    none, few = (expert_factor(moments[0], tokens, recipe).double() for tokens in (0, 2 * IN))
    plain = (moments[0] + recipe.damping * moments[0].diagonal().mean() * torch.eye(IN)).double()
    median = moments[0].diagonal().median().double()
    torch.testing.assert_close(none @ none.T, plain + median * torch.eye(IN), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(few @ few.T, plain + median * torch.eye(IN), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("search")
def test_codes_equal_a_direct_ldlq_with_explicit_inverses():
    """GPTQ's form of the recursion, in float64: errors pushed to later columns through the inverse of H."""
    weights, moments, codebook, scale = problem()
    codes = encode(weights, upper_factor(moments, 0.01), codebook, scale)
    for expert in range(EXPERTS):
        mean = moments[expert].diagonal().mean().double()
        inverse = torch.linalg.inv(moments[expert].double() + 0.01 * mean * torch.eye(IN))
        rest = weights[expert].double().clone()
        for start in range(0, IN, DIM):
            metric = torch.linalg.inv(inverse[:DIM, :DIM])
            target = rest[:, :DIM] / scale[expert, :, None].double()
            distance = target[:, None] - codebook[0].double()
            chosen = torch.einsum("okd,de,oke->ok", distance, metric, distance).argmin(1)
            agreement = (chosen == codes[expert, :, start // DIM]).double().mean()
            assert agreement > 0.95  # float32 may break near ties the other way
            used = codebook[0].double()[codes[expert, :, start // DIM]] * scale[expert, :, None].double()
            error = rest[:, :DIM] - used
            rest = rest[:, DIM:] - error @ metric @ inverse[:DIM, DIM:]
            # The inverse of what is left of H, after eliminating these columns.
            inverse = inverse[DIM:, DIM:] - inverse[DIM:, :DIM] @ metric @ inverse[:DIM, DIM:]


def test_feedback_lowers_the_weighted_error_of_nearest_codewords():
    weights, moments, codebook, scale = problem()
    codes = encode(weights, upper_factor(moments, 0.01), codebook, scale)
    vectors = (weights / scale[..., None]).reshape(-1, DIM)
    nearest = torch.cdist(vectors, codebook[0]).argmin(1).view(codes.shape)
    with_feedback = weighted_error(weights - decode(codes, codebook, scale), moments)
    assert with_feedback < 0.5 * weighted_error(weights - decode(nearest, codebook, scale), moments)


@pytest.mark.usefixtures("search")
def test_without_correlation_between_channels_it_is_the_nearest_codeword():
    weights, _, codebook, scale = problem()
    moments = torch.eye(IN).expand(EXPERTS, -1, -1)
    codes = encode(weights, upper_factor(moments, 0.0), codebook, scale)
    vectors = (weights / scale[..., None]).reshape(-1, DIM)
    assert torch.equal(codes.flatten(), torch.cdist(vectors.double(), codebook[0].double()).argmin(1))


@pytest.mark.usefixtures("search")
@pytest.mark.parametrize("books", [1, EXPERTS])
def test_refitted_codewords_minimise_the_weighted_error_of_their_targets(books):
    """With H = identity the refit is one k-means step: the mean of each cell, weighted by the squared scale."""
    weights, _, codebook, scale = problem()
    codebooks = codebook.expand(books, -1, -1).clone()
    factor = upper_factor(torch.eye(IN).expand(EXPERTS, -1, -1), 0.0)
    codes, refitted = encode_and_refit(weights, factor, codebooks, scale)
    targets = (weights / scale[..., None]).view(EXPERTS, OUT, -1, DIM)
    mass = scale.square()[..., None].expand(-1, -1, IN // DIM)
    for book in range(books):
        members = slice(None) if books == 1 else slice(book, book + 1)
        for codeword in range(SIZE):
            cell = codes[members] == codeword
            if cell.sum() < 3:
                continue
            expected = (targets[members][cell] * mass[members][cell][:, None]).sum(0) / mass[members][cell].sum()
            torch.testing.assert_close(refitted[book, codeword], expected, rtol=1e-2, atol=2e-3)


@pytest.mark.usefixtures("search")
def test_refit_lowers_the_error():
    weights, moments, codebook, scale = problem()
    factor = upper_factor(moments, 0.01)
    codes, refitted = encode_and_refit(weights, factor, codebook, scale)
    again = encode(weights, factor, refitted, scale)
    before = weighted_error(weights - decode(codes, codebook, scale), moments)
    assert weighted_error(weights - decode(again, refitted, scale), moments) < before


@pytest.mark.parametrize(
    ("experts", "rows", "dim", "size", "signed", "books"),
    [
        (2, 90, 8, 256, True, 1),
        (2, 90, 8, 256, False, 2),
        (3, 60, 4, 256, True, 3),
        (2, 40, 4, 4096, False, 1),
        (2, 60, 2, 256, False, 1),
        (1, 2100, 8, 256, True, 1),  # rows in two parts
    ],
)
def test_compiled_blocks_are_coded_and_refitted_like_the_plain_loop(
    monkeypatch, experts, rows, dim, size, signed, books
):
    """Equal up to rounding, which decides a near tie now and then, and feedback carries that on in its row. So it is
    with another number of threads, since torch's products between the blocks then round differently."""
    n = 200  # a whole block and a part of one
    generator = torch.Generator().manual_seed(5)
    scale = 0.5 + torch.rand(experts, rows, generator=generator)
    weights = torch.randn(experts, rows, n, generator=generator) * scale[..., None]
    roots = torch.randn(experts, n, 2 * n, generator=generator) * torch.logspace(0, -1, n)[:, None]
    factor = upper_factor(roots @ roots.mT / n, 0.01)
    tables = torch.randn(books, 1, size, dim, generator=generator)
    format = ProjectionFormat(experts, rows, n, "vq", dim, size, num_codebooks=books, signed=signed)
    codebook = TableCodebook(format, tables.abs() if signed else tables)

    def coded():
        refit = codebook.refit()
        codes = encode_with_feedback(weights, factor, codebook, scale, refit)
        values = [codebook.decode(codes[..., v]) for v in range(n // dim)]
        error = (weights - scale[..., None] * torch.cat(values, -1)) @ factor
        return codes, error.double().square().sum(), refit.normal, refit.right

    def alike(found, expected):
        assert (found[0] == expected[0]).double().mean() > 0.995
        torch.testing.assert_close(found[1], expected[1], rtol=1e-3, atol=0)
        for ours, theirs in zip(found[2:], expected[2:], strict=True):
            assert (ours - theirs).norm() < 5e-3 * theirs.norm()

    found = coded()
    assert all(torch.equal(a, b) for a, b in zip(coded(), found, strict=True))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        alike(coded(), found)
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(compiled, "feedback_library", lambda: None)
    alike(found, coded())


@pytest.mark.parametrize(("experts", "rows", "n", "bits"), [(2, 92, 200, 2), (3, 40, 130, 1), (1, 4200, 6, 3)])
def test_compiled_columns_of_a_trellis_are_coded_like_the_plain_loop(monkeypatch, experts, rows, n, bits):
    """Equal in the first channel and then up to rounding, as above; a tie takes several values of its sequence along.
    The last case has a sequence of two parts, which share the threads."""
    generator = torch.Generator().manual_seed(6)
    scale = 0.5 + torch.rand(experts, rows, generator=generator)
    weights = torch.randn(experts, rows, n, generator=generator) * scale[..., None]
    roots = torch.randn(experts, n, 2 * n, generator=generator) * torch.logspace(0, -1, n)[:, None]
    factor = upper_factor(roots @ roots.mT / n, 0.01)
    codebook = TrellisCodebook(ProjectionFormat(experts, rows, n, "trellis", 1, 1 << bits, num_codebooks=1))

    def coded():
        codes = encode_with_feedback(weights, factor, codebook, scale)
        decoded = torch.cat([codebook.decode(codes[..., column]) for column in range(n)], -1)
        return codes, ((weights - scale[..., None] * decoded) @ factor).double().square().sum()

    found, error = coded()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        again, _ = coded()
    finally:
        torch.set_num_threads(threads)
    assert (again == found).double().mean() > 0.995
    monkeypatch.setattr(TrellisCodebook, "code_block", lambda self, block, refit: False)
    expected, error_of_loop = coded()
    assert torch.equal(found[..., 0], expected[..., 0])
    assert (found == expected).double().mean() > 0.95
    torch.testing.assert_close(error, error_of_loop, rtol=1e-3, atol=0)


@pytest.mark.parametrize("where", ["weights", "factor"])
def test_a_trellis_refuses_targets_that_are_not_finite(where):
    weights, factor = torch.randn(1, 20, 30), torch.eye(30)[None].clone()
    (weights if where == "weights" else factor)[0, 0, 3] = torch.nan
    codebook = TrellisCodebook(ProjectionFormat(1, 20, 30, "trellis", 1, 4, num_codebooks=1))
    with pytest.raises(NumericalError, match="NaN or infinite"):
        encode_with_feedback(weights, factor, codebook, torch.ones(1, 20))


def test_order_keeps_vectors_whole_and_starts_with_the_largest_inputs():
    moment = torch.diag(torch.tensor([1.0, 1.0, 9.0, 0.0, 3.0, 3.0]))
    assert channel_order(moment, 2).tolist() == [2, 3, 4, 5, 0, 1]


def test_moment_that_cannot_be_factorised_is_refused():
    with pytest.raises(NumericalError, match="not positive definite"):
        upper_factor(-torch.eye(4), 0.01)


def test_predicted_variances_are_those_of_the_targets():
    """Against the recursion itself, run with a quantizer that adds noise of the stated variance to its target."""
    generator = torch.Generator().manual_seed(3)
    n, rows, distortion = 24, 40000, 0.2
    root = torch.randn(n, n, generator=generator) * torch.logspace(0, -1, n)
    factor = upper_factor(root @ root.mT / n, 0.01)
    spread = torch.linspace(0.5, 2, n)
    weights = torch.randn(rows, n, generator=generator) * spread
    error, variances = torch.zeros(rows, n), []
    for j in range(n):
        target = weights[:, j] + error[:, :j] @ factor[:j, j] / factor[j, j]
        variances.append(target.var())
        noise = (distortion * variances[-1]).sqrt() * torch.randn(rows, generator=generator)
        error[:, j] = weights[:, j] - target + noise
    torch.testing.assert_close(
        target_variances(error_passing(factor), spread.square(), distortion), torch.stack(variances), rtol=0.1, atol=0
    )


def test_simulated_variances_are_those_that_the_errors_passed_on_give():
    """Over several blocks of channels, the last of them a part of one."""
    generator = torch.Generator().manual_seed(4)
    n, distortion = 300, 0.2
    root = torch.randn(n, 2 * n, generator=generator) * torch.logspace(0, -1, n)[:, None]
    factor, own = upper_factor(root @ root.mT / n, 0.01), torch.linspace(0.5, 2, n)
    inverse = torch.linalg.inv(factor.double())
    expected = own.double().clone()
    for j in range(n):  # in the coordinates of M each error is white, of `distortion` times its target's variance
        passed = distortion * expected[:j] * factor.diagonal()[:j].double().square()
        expected[j] += (passed * inverse[:j, j].square()).sum()
    assert (expected / own).max() > 1.5
    torch.testing.assert_close(target_variances(error_passing(factor), own, distortion), expected.float())
    found = simulated_target_variances(factor, own, distortion) / expected
    assert found.std() < 0.06 and abs(found.mean() - 1) < 0.02
