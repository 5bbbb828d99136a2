"""The vector benchmark at tiny sizes: its figures against their definitions, its table against its figures."""

import json
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
import vector_benchmark
from vector_benchmark import QUICK, gaussian_mixture, recall_at_1
from vector_files import read_vectors

from kbvq.errors import ConfigError


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


def write_vectors(path: Path, values: np.ndarray) -> Path:
    """By hand, number after number: .fvecs and .bvecs with a dimension before each, .fbin with one head."""
    kind = {".fvecs": "<f4", ".bvecs": "u1", ".fbin": "<f4"}[path.suffix]
    head = b"" if path.suffix != ".fbin" else np.array(values.shape, "<u4").tobytes()
    before = b"" if head else np.array([values.shape[1]], "<i4").tobytes()
    path.write_bytes(head + b"".join(before + row.astype(kind).tobytes() for row in values))
    return path


@pytest.mark.parametrize("suffix", [".fvecs", ".bvecs", ".fbin"])
def test_published_files_hold_the_vectors_that_were_written(tmp_path: Path, suffix: str) -> None:
    values = np.random.default_rng(0).integers(0, 256, (7, 5)) / (1 if suffix == ".bvecs" else 7)
    path = write_vectors(tmp_path / f"some{suffix}", values)
    expected = torch.from_numpy(values).float()
    assert torch.equal(read_vectors(path), expected)
    assert torch.equal(read_vectors(path, 3), expected[:3])
    with pytest.raises(ConfigError, match="7 vectors, 8 are asked for"):
        read_vectors(path, 8)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match="may be cut off"):
        read_vectors(path)


def test_files_that_hold_no_vectors_are_refused(tmp_path: Path) -> None:
    mixed = tmp_path / "mixed.bvecs"
    mixed.write_bytes(b"\x02\0\0\0ab\x03\0\0\0cd")
    (tmp_path / "empty.fvecs").touch()
    np.save(tmp_path / "flat.npy", np.zeros(3))
    for name, message in {
        "mixed.bvecs": "differ in dimension",
        "empty.fvecs": "does not begin with a dimension",
        "flat.npy": "no vectors but an array",
        "some.h5": "are read from .fvecs",
        "missing.npy": "cannot read",
    }.items():
        with pytest.raises(ConfigError, match=message):
            read_vectors(tmp_path / name)


def test_benchmark_measures_vectors_of_files(tmp_path: Path) -> None:
    vectors = gaussian_mixture(QUICK, seed=0)
    files = [write_vectors(tmp_path / f"{n}.fvecs", getattr(vectors, n).numpy()) for n in ("train", "base", "queries")]
    arguments = ["--quick", "--seeds", "1", "--no-faiss", "--output", str(tmp_path), "--epochs", "1", "1"]
    arguments += ["--files", "tiny", *map(str, files), "--counts", "1024", "200", "30"]
    vector_benchmark.main(arguments)
    record = json.loads((tmp_path / "tiny.json").read_text())
    assert {r["data"] for r in record["results"]} == {"tiny"} and record["setting"]["base_vectors"] == 200
    base = vectors.base[:200]
    variance = float((base - vectors.train.mean(0)).square().sum(1).mean())
    first = record["results"][0]
    assert first["mse"] / first["relative_mse"] == pytest.approx(variance, rel=1e-5)
    assert "## tiny: 8 dimensions, 1024 training vectors" in (tmp_path / "tiny.md").read_text()
