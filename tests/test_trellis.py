import itertools
from fractions import Fraction

import pytest
import torch
from scipy.stats import norm

from kbvq.codes.level_choice import TAILS
from kbvq.codes.levels import levels
from kbvq.codes.trellis import MULTIPLIERS, PART, TrellisCode
from kbvq.errors import ConfigError, NumericalError
from kbvq_kernels import encode as compiled

# and a length of which all paths can be tried; the second has too few states for the compiled search
TINY = [(TrellisCode(1, 4), 10), (TrellisCode(2, 4), 6), (TrellisCode(3, 6), 4)]


@pytest.fixture
def in_torch(monkeypatch):
    monkeypatch.setattr(compiled, "trellis_library", lambda: None)


@pytest.fixture(params=["compiled", "torch"])
def search(request):
    """Both searches; a test machine without a compiler would fail here, by name."""
    if request.param == "torch":
        request.getfixturevalue("in_torch")
    else:
        assert compiled.trellis_library() is not None, "no C++ compiler"


def unit_gaussian(count: int, length: int, seed: int) -> torch.Tensor:
    """Normal values scaled to second moment 1, which takes most of the sampling noise out of an error."""
    values = torch.randn(count, length, generator=torch.Generator().manual_seed(seed))
    return values / values.square().mean().sqrt()


def walk(code: TrellisCode, codes: list[int], state: int) -> list[int]:
    """States one by one: what enters below pushes the oldest bits out above."""
    states = []
    for c in codes:
        state = ((state << code.bits) | c) % (1 << code.state_bits)
        states.append(state)
    return states


def closed_walk(code: TrellisCode, codes: list[int]) -> list[int]:
    """States of a tail-biting sequence, which starts where it ends: from the state that the codes themselves leave."""
    return walk(code, codes, walk(code, codes, 0)[-1])


def codeword(code: TrellisCode, state: int) -> float:
    return float(levels(code.tail)[(state * MULTIPLIERS[code.bits]) % 2**32 // 2**24])


def cost(code: TrellisCode, states: torch.Tensor, values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted squared error of paths [.., length], float64."""
    table = torch.tensor([codeword(code, s) for s in range(1 << code.state_bits)], dtype=torch.float64)
    return (weights.double() * (values.double() - table[states]).square()).sum(-1)


def tiny_problem(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    values, weights = torch.randn(40, length, generator=generator), torch.rand(40, length, generator=generator)
    weights[3] = 0
    weights[4, 2:] = 0
    return values, weights


@pytest.mark.parametrize("tail", TAILS)
def test_levels_are_stretched_gaussian_quantiles_and_no_platform_can_round_them_otherwise(tail):
    points = [Fraction(4 * j + 1, 1022) for j in range(256)]
    quantiles = torch.from_numpy(norm.ppf([float(p) for p in points]))
    quantiles *= (tail / 100 * quantiles**2 / 2).exp()
    rounded = levels(tail).double()
    assert torch.equal(rounded, quantiles.half().double())
    assert torch.equal(rounded, -rounded.flip(0))
    # The neighbouring float16 is farther away than the rounded one by much more than any libm's error.
    for away in (torch.inf, -torch.inf):
        neighbour = torch.nextafter(quantiles.half(), torch.full((256,), away, dtype=torch.float16)).double()
        assert ((neighbour - quantiles).abs() - (rounded - quantiles).abs()).min() > 1e-9


@pytest.mark.parametrize(("bits", "tail"), [(1, 0), (2, 0), (3, 0), (4, 0), (2, 12), (4, 25)])
def test_codewords_follow_the_integer_formula(bits, tail):
    code = TrellisCode(bits, tail=tail)
    states = [0, 1, 2, 77, 2049, 4095]
    assert code.codewords()[states].tolist() == [codeword(code, s) for s in states]
    # a fair share of the states on each level: the product permutes the residues
    counts = torch.unique(code.codewords(), return_counts=True)[1]
    assert len(counts) == 256
    assert counts.max() <= 2 * 4096 // 256


@pytest.mark.usefixtures("search")
@pytest.mark.parametrize(("code", "length"), TINY)
def test_free_search_is_optimal(code, length):
    values, weights = tiny_problem(length)
    start_and_codes = itertools.product(
        range(1 << code.state_bits - code.bits), itertools.product(range(1 << code.bits), repeat=length)
    )
    paths = torch.tensor([walk(code, list(codes), start) for start, codes in start_and_codes])
    optimum = torch.stack([cost(code, paths, v, w).amin() for v, w in zip(values, weights, strict=True)])
    found = code.best_path(values, weights)
    for states in found.tolist():
        codes = [s % (1 << code.bits) for s in states]
        assert walk(code, codes[1:], states[0]) == states[1:]
    torch.testing.assert_close(cost(code, found, values, weights), optimum, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("search")
@pytest.mark.parametrize(("code", "length"), TINY)
def test_closed_search_is_optimal_for_its_seam_and_encode_close_to_the_best_seam(code, length):
    values, weights = tiny_problem(length)
    every = [list(codes) for codes in itertools.product(range(1 << code.bits), repeat=length)]
    paths = torch.tensor([closed_walk(code, codes) for codes in every])
    best = torch.stack([cost(code, paths, v, w).argmin() for v, w in zip(values, weights, strict=True)])
    optimum = cost(code, paths[best], values, weights)

    found = code.best_path(values, weights, paths[best, -1], paths[best, -1])
    for states in found.tolist():
        assert closed_walk(code, [s % (1 << code.bits) for s in states]) == states
    torch.testing.assert_close(cost(code, found, values, weights), optimum, rtol=1e-5, atol=1e-6)

    codes = code.encode(values.flip(1), weights.flip(1)).flip(1)
    encoded = torch.tensor([closed_walk(code, c) for c in codes.tolist()])
    excess = cost(code, encoded, values, weights) - optimum
    assert excess.min() > -1e-6
    # The seam is a guess, and it fixes up to a third of the codes of so short a sequence.
    assert (excess < 1e-6).float().mean() > 0.5
    assert excess.sum() < 0.5 * optimum.sum()


@pytest.mark.parametrize(
    ("bits", "state_bits", "length"),
    [(1, 4, 9), (1, 12, 60), (2, 8, 50), (2, 12, 80), (2, 12, 7), (3, 12, 60), (3, 9, 40), (4, 12, 40), (4, 8, 60)],
)
def test_compiled_search_finds_the_codes_of_the_one_in_torch(monkeypatch, bits, state_bits, length):
    """Both are exact up to the rounding of costs, which decides ties: of random values hardly any."""
    code = TrellisCode(bits, state_bits)
    values = unit_gaussian(5, length, seed=bits)
    values[0] *= 5  # farther out than any level
    weights = torch.rand(5, length, generator=torch.Generator().manual_seed(8)).square()
    weights[2, : length // 2] = 0
    seam = torch.randint(1 << state_bits, (5,), generator=torch.Generator().manual_seed(9))

    def codes_and_costs():
        codes = [code.encode(values), code.encode(values, weights)]
        decoded = [(w * (values - code.decode(c)).square()).sum(1) for c, w in zip(codes, (1, weights), strict=True)]
        paths = [code.best_path(values, weights, s, s) for s in (None, seam)]
        return codes, torch.stack(decoded + [cost(code, path, values, weights).float() for path in paths])

    found, costs = codes_and_costs()
    monkeypatch.setattr(compiled, "trellis_library", lambda: None)
    expected, expected_costs = codes_and_costs()
    # in the second sequence half of the values do not count, and all paths between the others cost the same
    counted = [torch.ones_like(weights, dtype=torch.bool), weights > 0]
    for ours, theirs, mask in zip(found, expected, counted, strict=True):
        assert (ours == theirs)[mask].float().mean() > 0.99
    torch.testing.assert_close(costs, expected_costs, rtol=1e-5, atol=1e-6)


def test_compiled_search_stays_exact_over_long_sequences_and_does_not_depend_on_the_others():
    code = TrellisCode(2, 8)
    values = unit_gaussian(3, 20_000, seed=12)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        codes = code.encode(values)
    finally:
        torch.set_num_threads(threads)
    for sequence, alone in zip(codes, values, strict=True):
        assert torch.equal(code.encode(alone[None])[0], sequence)
    # An error of the costs that grew with the length would show in the second half.
    halves = (values - code.decode(codes)).square().unflatten(1, (2, -1)).mean((0, 2))
    torch.testing.assert_close(halves[0], halves[1], rtol=0.02, atol=0)


@pytest.mark.usefixtures("search")
def test_a_long_sequence_is_searched_in_parts_that_cost_little():
    code = TrellisCode(2, 8)
    values = unit_gaussian(2, 2 * PART + 1, seed=13)
    weights = torch.rand(values.shape, generator=torch.Generator().manual_seed(14))
    codes = code.encode(values, weights)
    closed = (weights * (values - code.decode(codes)).square()).sum()
    states = torch.tensor([closed_walk(code, row) for row in codes.flip(1).tolist()])
    assert cost(code, states, values.flip(1), weights.flip(1)).sum() == pytest.approx(closed.item(), rel=1e-5)
    # One search over everything is a lower bound; the two seams take a part of the 8 bits of their states from it.
    lower_bound = cost(code, code.best_path(values.flip(1), weights.flip(1)), values.flip(1), weights.flip(1)).sum()
    assert lower_bound < closed < 1.003 * lower_bound


def test_closing_a_sequence_costs_little():
    code = TrellisCode(2)
    values = unit_gaussian(16, 512, seed=9)
    weights = torch.ones_like(values)
    closed = (values - code.decode(code.encode(values))).square().sum()
    # An open path is a lower bound. Its free start is worth the 12 bits of a state in 1024: 2^(2·12/512) − 1 = 3.3 %.
    lower_bound = cost(code, code.best_path(values, weights), values, weights).sum()
    assert lower_bound < closed < 1.033 * lower_bound


@pytest.mark.parametrize(
    ("bits", "state_bits", "length"), [(1, 12, 16), (2, 12, 100), (3, 12, 40), (4, 16, 32), (2, 4, 8)]
)
def test_decoding_by_windows_walks_the_trellis_from_the_end(bits, state_bits, length):
    code = TrellisCode(bits, state_bits)
    values = unit_gaussian(3, length, seed=bits)
    codes = code.encode(values)
    assert codes.dtype == torch.uint8 and codes.shape == values.shape
    expected = [[codeword(code, s) for s in closed_walk(code, row[::-1])][::-1] for row in codes.tolist()]
    assert code.decode(codes).tolist() == expected
    assert torch.equal(code.decode(codes[1]), code.decode(codes)[1])


@pytest.mark.parametrize(("bits", "state_bits", "length"), [(1, 12, 24), (2, 12, 20), (3, 12, 16), (4, 16, 6)])
def test_any_window_can_be_read_from_the_packed_bytes(bits, state_bits, length):
    code = TrellisCode(bits, state_bits)
    codes = torch.randint(1 << bits, (2, 5, length), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    packed = code.pack(codes)
    assert packed.dtype == torch.uint8 and packed.shape == (2, 5, length * bits // 8)
    assert torch.equal(code.unpack(packed), codes)
    decoded = code.decode(codes)
    for row in itertools.product(range(2), range(5)):
        stream = bytes(packed[row].tolist())
        word = int.from_bytes(stream + stream, "little")
        values = [codeword(code, (word >> bits * t) % (1 << state_bits)) for t in range(length)]
        assert decoded[row].tolist() == values


@pytest.mark.parametrize(("bits", "limit"), [(1, 0.280), (2, 0.0702), (3, 0.0183), (4, 0.0051)])
def test_unit_gaussian_error_lies_between_shannon_and_a_random_order(bits, limit):
    code = TrellisCode(bits)
    values = unit_gaussian(64, 512, seed=11)
    error = (values - code.decode(code.encode(values))).square().mean()
    # The limits leave 2 %, twice the sampling error, over 0.274, 0.0690, 0.0178 and 0.0049. Quantiles in random order
    # have 0.0737, 0.0198 and 0.0053 at 2 to 4 bits, Lloyd-Max scalars 0.363, 0.1175, 0.0345 and 0.0095.
    assert 4.0**-bits < error < limit


def test_more_states_less_error():
    values = unit_gaussian(16, 256, seed=2)
    errors = [(values - c.decode(c.encode(values))).square().mean() for c in (TrellisCode(2, b) for b in (4, 8, 12))]
    assert errors[0] > 1.05 * errors[1] > 1.05**2 * errors[2]


def test_weighted_values_are_coded_better():
    code = TrellisCode(2)
    values = unit_gaussian(16, 256, seed=3)
    weights = torch.ones_like(values)
    weights[:, ::2] = 9
    plain, weighted = ((values - code.decode(code.encode(values, w))).square() for w in (None, weights))
    assert (weights * weighted).mean() < 0.97 * (weights * plain).mean()
    assert torch.equal(code.encode(values, torch.full_like(values, 4.0)), code.encode(values))


@pytest.mark.usefixtures("in_torch")
def test_working_memory_for_fewer_sequences_splits_the_batch_and_changes_nothing():
    code = TrellisCode(2, 8)
    values = unit_gaussian(7, 64, seed=4)
    whole = code.encode(values)
    assert torch.equal(whole, code.encode(values))
    for scratch in (code.scratch(7, 64), code.scratch(3, 64).fill_(torch.nan)):
        split = code.encode(values, scratch=scratch)
        # not equal codes: the matrix product may round differently for another batch, and near-ties fall either way
        torch.testing.assert_close(
            (values - code.decode(split)).square().sum(1),
            (values - code.decode(whole)).square().sum(1),
            rtol=1e-4,
            atol=0,
        )


@pytest.mark.usefixtures("search")
def test_no_sequences_give_no_codes():
    assert TrellisCode(2).encode(torch.zeros(0, 512)).shape == (0, 512)


@pytest.mark.usefixtures("search")
def test_inputs_are_not_changed():
    values, weights = tiny_problem(12)
    before = values.clone(), weights.clone()
    TINY[0][0].encode(values, weights)
    assert torch.equal(values, before[0]) and torch.equal(weights, before[1])


@pytest.mark.parametrize(("bits", "state_bits"), [(0, 12), (5, 10), (2, 13), (4, 4), (2, 18)])
def test_unsupported_codes_are_refused(bits, state_bits):
    with pytest.raises(ConfigError):
        TrellisCode(bits, state_bits)


def test_bad_values_are_refused():
    code, good = TrellisCode(3), torch.zeros(2, 16)
    bad = good.clone()
    bad[1, 7] = torch.nan
    with pytest.raises(NumericalError, match="NaN"):
        code.encode(bad)
    with pytest.raises(NumericalError, match="error weights"):
        code.encode(good, bad)
    with pytest.raises(NumericalError, match="error weights"):
        code.encode(good, good - 1)
    with pytest.raises(ConfigError, match="length >= 4"):
        code.encode(good[:, :3])
    with pytest.raises(ConfigError, match="num_sequences"):
        code.encode(good[0])
    with pytest.raises(ConfigError, match=r"\[2, 8\].*\[2, 16\]"):
        code.encode(good, torch.ones(2, 8))


@pytest.mark.usefixtures("in_torch")
def test_too_little_working_memory_is_refused():
    with pytest.raises(ConfigError, match="too small"):
        TrellisCode(3).encode(torch.zeros(2, 16), scratch=torch.zeros(100))


def test_bad_codes_are_refused():
    code = TrellisCode(3)
    with pytest.raises(ConfigError, match="multiple of 8"):
        code.pack(torch.zeros(2, 12, dtype=torch.uint8))
    with pytest.raises(ConfigError, match=r"\[0, 8\]; 3 bits hold \[0, 7\]"):
        code.pack(torch.tensor([0, 8] * 4))
    with pytest.raises(ConfigError, match="window of 4"):
        code.decode(torch.zeros(2, 3, dtype=torch.uint8))
    with pytest.raises(ConfigError, match="5 bytes"):
        code.unpack(torch.zeros(5, dtype=torch.uint8))


@pytest.mark.gpu
def test_a_gpu_finds_paths_as_good():
    code = TrellisCode(2)
    values = unit_gaussian(16, 256, seed=5)
    weights = torch.rand(16, 256, generator=torch.Generator().manual_seed(6))
    on_gpu = code.encode(values.cuda(), weights.cuda())
    decoded = code.decode(on_gpu)
    assert torch.equal(decoded.cpu(), code.decode(on_gpu.cpu()))
    errors = [
        (weights * (values - v).square()).sum(1) for v in (decoded.cpu(), code.decode(code.encode(values, weights)))
    ]
    # another order of additions may decide a near-tie at the seam otherwise
    torch.testing.assert_close(errors[0].sum(), errors[1].sum(), rtol=1e-3, atol=0)
