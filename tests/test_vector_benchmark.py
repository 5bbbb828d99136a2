"""The vector benchmark at tiny sizes: its figures against their definitions, its table against its figures."""

import json
import statistics
from pathlib import Path

import pytest
import torch
import vector_benchmark
from vector_benchmark import QUICK, gaussian_mixture, recall_at_1


def test_recall_is_the_share_of_queries_that_keep_their_neighbour() -> None:
    base = torch.tensor([[0.0, 0], [4, 0], [8, 0]])
    queries = torch.tensor([[0.5, 0], [3, 0], [5, 0], [9, 0]])
    decoded = torch.tensor([[0.0, 0], [2.5, 0], [3.9, 0]])  # the third query now finds the last vector
    assert recall_at_1(queries, base, base) == 1
    assert recall_at_1(queries, base, decoded) == 0.75


def test_mixture_has_the_spectrum_it_states() -> None:
    settings = QUICK
    vectors = gaussian_mixture(settings, 0)
    dim = settings.mixture_dim
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(settings.mixture_components, dim, generator=generator)
    centred = vectors.train - means[torch.cdist(vectors.train, means).argmin(1)]
    expected = sum(torch.exp(torch.tensor(-12.8 * axis / dim)).item() for axis in range(dim))
    assert float(centred.square().sum(1).mean()) == pytest.approx(expected, rel=0.1)
    assert torch.equal(vectors.base, gaussian_mixture(settings, 0).base)
    assert not torch.equal(vectors.base, vectors.train[: len(vectors.base)])


def test_benchmark_compares_all_quantizers(tmp_path: Path) -> None:
    vector_benchmark.main(["--quick", "--seeds", "2", "--output", str(tmp_path)])
    record = json.loads((tmp_path / "vectors.json").read_text())
    results = record["results"]
    error: dict[tuple, list[float]] = {}
    for r in results:
        assert 0 < r["relative_mse"] < 1 and 0 <= r["recall_at_1"] <= 1
        error.setdefault((r["data"], r["num_bytes"], r["quantizer"], r["beam"]), []).append(r["mse"])
    own = {(q, beam) for q in ("RQ", "QINCo", "RQ-MoE") for beam in (1, QUICK.beam)}
    quantizers = own | {("faiss PQ", 1), ("faiss RQ", QUICK.beam)}
    few, many = QUICK.num_bytes
    assert set(error) == {(d, b, *q) for d in ("mixture", "hidden") for b in (few, many) for q in quantizers}
    mean = {key: statistics.mean(values) for key, values in error.items()}
    for data in ("mixture", "hidden"):
        for quantizer, beam in quantizers:
            assert mean[data, many, quantizer, beam] < mean[data, few, quantizer, beam]
        for quantizer in ("RQ", "QINCo", "RQ-MoE"):
            assert mean[data, many, quantizer, QUICK.beam] < mean[data, many, quantizer, 1]
        # the same method by another hand, trained and searched alike
        assert mean[data, many, "RQ", QUICK.beam] == pytest.approx(mean[data, many, "faiss RQ", QUICK.beam], rel=0.2)
    for network in ("QINCo", "RQ-MoE"):
        assert mean["mixture", many, network, 1] < mean["mixture", many, "RQ", 1]
    assert len(error["mixture", few, "RQ", 1]) == 2

    table = (tmp_path / "vectors.md").read_text()
    for (_, num_bytes, quantizer, beam), values in error.items():
        spread = f"{statistics.mean(values):.4g}" + (f" ± {statistics.stdev(values):.4g}" if len(values) > 1 else "")
        assert f"| {num_bytes} | {quantizer} | {beam} | {spread} |" in table
    assert table.count("Decoding speed of RQ-MoE") == 4
