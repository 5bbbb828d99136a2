"""Codes of every format against exhaustive searches, refits against least squares."""

import itertools

import pytest
import torch

from kbvq.codes.codebooks import TableCodebook, TrellisCodebook
from kbvq.codes.packing import decode_codes
from kbvq.codes.trellis import TrellisCode
from kbvq.structures import ProjectionFormat

EXPERTS, ROWS = 2, 24


def metric(dim, generator):
    return torch.randn(EXPERTS, dim, dim, generator=generator).triu() + 2 * torch.eye(dim)


def problem(format, seed=0):
    """Targets, metric, mass and tables of a format."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randn(EXPERTS, ROWS, format.vector_dim, generator=generator)
    mass = 0.5 + torch.rand(EXPERTS, ROWS, generator=generator)
    shape = (format.num_codebooks, format.num_tables, format.codebook_size, format.vector_dim)
    tables = torch.randn(shape, generator=generator) / torch.arange(1, 1 + shape[1])[:, None, None]
    groups = torch.randint(format.num_groups, (shape[0], shape[2]), generator=generator)
    if format.signed:
        tables = tables.abs()
    book = TableCodebook(format, tables, groups if format.num_groups > 1 else None)
    return targets, metric(format.vector_dim, generator), mass, book


def errors(targets, values, metric):
    return ((targets - values).double() @ metric.double()).square().sum(-1)


@pytest.mark.parametrize("books", [1, EXPERTS])
def test_plain_codes_are_the_nearest_under_the_metric(books):
    format = ProjectionFormat(EXPERTS, ROWS, 8, "vq", 4, 256, num_codebooks=books)
    targets, metric, mass, book = problem(format)
    codes = book.encode(targets, metric, mass)
    for expert in range(EXPERTS):
        table = book.tables[min(expert, books - 1), 0]
        all_errors = errors(targets[expert][:, None], table, metric[expert])
        chosen = all_errors.gather(1, codes[0, expert][:, None])[:, 0]
        torch.testing.assert_close(chosen, all_errors.amin(1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dim", [4, 8])
def test_signs_and_magnitudes_are_close_to_the_best_of_all_combinations(dim):
    """Signs are chosen greedily, so a few vectors may miss the optimum of 2^d · 256, none by much."""
    format = ProjectionFormat(EXPERTS, ROWS, 8, "vq", dim, 256, signed=True)
    targets, metric, mass, book = problem(format)
    codes = book.encode(targets, metric, mass)
    found = errors(targets, book.decode(codes), metric)
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=dim)))
    for expert in range(EXPERTS):
        every = (signs[:, None] * book.tables[0, 0]).flatten(0, 1)
        best = errors(targets[expert][:, None], every, metric[expert]).amin(1)
        assert (found[expert] >= best - 1e-5).all()
        assert found[expert].sum() < 1.15 * best.sum()
        assert ((found[expert] - best) < 1e-5).double().mean() > 0.5


def test_with_a_diagonal_metric_the_signs_are_those_of_the_targets_and_the_choice_is_exact():
    format = ProjectionFormat(EXPERTS, ROWS, 8, "vq", 8, 256, signed=True, codebook_dtype="int8")
    targets, _, mass, book = problem(format)
    diagonal = torch.diag_embed(torch.linspace(0.5, 2, 8).expand(EXPERTS, -1))
    codes = book.encode(targets, diagonal, mass)
    assert torch.equal(book.decode(codes) < 0, (targets < 0) & (book.decode(codes) != 0))
    best = errors(targets.abs()[:, :, None], book.tables[0, 0], diagonal[:, None]).amin(2)
    torch.testing.assert_close(errors(targets, book.decode(codes), diagonal), best, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 3])
def test_sums_are_no_worse_than_greedy_ones_and_keep_to_their_group(groups):
    name = "rq" if groups == 1 else "rq-grouped"
    format = ProjectionFormat(EXPERTS, ROWS, 8, name, 4, 256, num_stages=2, num_groups=groups)
    targets, metric, mass, book = problem(format)
    codes = book.encode(targets, metric, mass)
    found = errors(targets, book.decode(codes), metric)
    tables = book.tables[0]
    for expert in range(EXPERTS):
        for row in range(ROWS):
            first = errors(targets[expert, row], tables[0], metric[expert]).argmin()
            group = 0 if groups == 1 else int(book.groups[0, first])
            greedy = errors(targets[expert, row] - tables[0, first], tables[1 + group], metric[expert]).min()
            assert found[expert, row] <= greedy + 1e-4
            k0, k1 = codes[:, expert, row].tolist()
            group = 0 if groups == 1 else int(book.groups[0, k0])
            torch.testing.assert_close(book.decode(codes)[expert, row], tables[0, k0] + tables[1 + group, k1])


@pytest.mark.parametrize(
    "format",
    [
        ProjectionFormat(EXPERTS, ROWS, 8, "vq", 4, 256),
        ProjectionFormat(EXPERTS, ROWS, 8, "vq", 4, 256, num_codebooks=EXPERTS),
        ProjectionFormat(EXPERTS, ROWS, 8, "vq", 4, 256, signed=True),
        ProjectionFormat(EXPERTS, ROWS, 8, "rq", 4, 256, num_stages=2),
        ProjectionFormat(EXPERTS, ROWS, 8, "rq-grouped", 4, 256, num_stages=2, num_groups=2),
    ],
)
def test_refitted_tables_solve_the_least_squares_problem_of_each_codeword(format):
    """A codeword used often enough is where no small move lowers the weighted error, the other stages fixed."""
    targets, _, mass, book = problem(format)
    generator = torch.Generator().manual_seed(7)
    targets = torch.randn(EXPERTS, 3000, format.vector_dim, generator=generator)
    mass = 0.5 + torch.rand(EXPERTS, 3000, generator=generator)
    metrics = metric(format.vector_dim, generator)
    codes = book.encode(targets, metrics, mass)
    refit = book.refit()
    refit.add(codes, targets, metrics, mass)
    solved = refit.solve()
    before = (errors(targets, book.decode(codes), metrics) * mass).sum()
    if format.num_stages == 1:
        assert (errors(targets, solved.decode(codes), metrics) * mass).sum() < before
    stage = format.num_stages - 1  # with the first stage as it was, the last one is at its optimum
    mixed = book.tables.clone()
    cells = book.cells(codes)[stage]
    flat, chosen = mixed.flatten(0, 2), solved.tables.flatten(0, 2)
    flat[cells.unique()] = chosen[cells.unique()]
    optimum = TableCodebook(format, mixed, book.groups)
    least = (errors(targets, optimum.decode(codes), metrics) * mass).sum()
    assert least < before
    for cell in cells.unique()[:5].tolist():
        if format.signed and (chosen[cell] == 0).any():
            continue
        for step in (-0.02, 0.02):
            moved = mixed.clone()
            moved.flatten(0, 2)[cell, 1] += step
            worse = TableCodebook(format, moved, book.groups)
            assert (errors(targets, worse.decode(codes), metrics) * mass).sum() > least


@pytest.mark.parametrize(
    "format",
    [
        ProjectionFormat(EXPERTS, ROWS, 16, "vq", 8, 256, signed=True, codebook_dtype="int8"),
        ProjectionFormat(EXPERTS, ROWS, 16, "rq-grouped", 8, 256, num_stages=3, num_groups=4, num_codebooks=EXPERTS),
        ProjectionFormat(EXPERTS, ROWS, 16, "trellis", 1, 8),
    ],
)
def test_packed_codes_decode_to_what_the_codebook_says(format):
    book = TrellisCodebook(format) if format.codebook == "trellis" else problem(format)[3]
    generator = torch.Generator().manual_seed(1)
    groups = range(16 // format.vector_dim)
    shape = (EXPERTS, ROWS, format.vector_dim)
    metrics = metric(format.vector_dim, generator)
    vectors = [torch.randn(shape, generator=generator) for _ in groups]
    codes = [book.encode(vector, metrics, torch.ones(EXPERTS, ROWS)) for vector in vectors]
    tensors = book.pack(torch.stack(codes, -1))
    specs = format.tensors()
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        name: (spec.shape, spec.dtype) for name, spec in specs.items()
    }
    for expert in range(EXPERTS):
        expected = torch.cat([book.decode(of_group)[expert] for of_group in codes], -1)
        torch.testing.assert_close(decode_codes(format, tensors, expert), expected)


def test_trellis_columns_are_sequences_weighted_by_row():
    format = ProjectionFormat(EXPERTS, 32, 4, "trellis", 1, 4)
    generator = torch.Generator().manual_seed(2)
    targets = torch.randn(EXPERTS, 32, 1, generator=generator)
    mass = 0.1 + torch.rand(EXPERTS, 32, generator=generator)
    codes = TrellisCodebook(format).encode(targets, torch.ones(EXPERTS, 1, 1), mass)
    values = TrellisCode(2).decode(codes[0])
    unweighted = TrellisCode(2).decode(TrellisCode(2).encode(targets[..., 0]))
    error, plain = (((v - targets[..., 0]).square() * mass).sum() for v in (values, unweighted))
    assert error < plain
