"""RQ-MoE against its equations written vector by vector, and against the two quantizers it contains."""

import json
import re
from pathlib import Path

import pytest
import torch
from qinco import QINCo
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kbvq.codes import rq_moe
from kbvq.codes.residual_quantization import fit_residual_codebooks, residual_decode, residual_encode
from kbvq.codes.rq_moe import RQMoE
from kbvq.errors import CheckpointError, ConfigError, NumericalError


def mixture(n: int, dim: int = 6, seed: int = 0) -> torch.Tensor:
    """Vectors [n, dim] around four centres, each with its own narrow covariance."""
    generator = torch.Generator().manual_seed(99)
    centres = torch.randn(4, dim, generator=generator)
    maps = torch.randn(4, dim, 2, generator=generator)
    generator = torch.Generator().manual_seed(seed)
    component = torch.randint(4, (n,), generator=generator)
    return centres[component] + torch.einsum("ndk,nk->nd", maps[component], torch.randn(n, 2, generator=generator))


def perturbed(model: RQMoE, seed: int = 0) -> RQMoE:
    """The model with every parameter moved away from its start, so that no term is zero or an identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def untrained(depth: int = 1, refiners: int = 3, conditioning: str = "instruction") -> RQMoE:
    model = RQMoE(6, 4, 8, refiners, depth, 5, conditioning=conditioning)
    return model.fit(mixture(400), epochs=0, kmeans_iterations=5, progress=False)


def reference_codeword(model: RQMoE, stage: int, code: int, condition: torch.Tensor) -> torch.Tensor:
    """ĉ_m[j | z] of one code, in float64, as the equations say it; condition [d]."""
    if stage == 0:
        return model.codebooks[0, code].double()
    part = stage - 1
    u = model.projection[part].double() @ torch.cat([model.codebooks[stage, code].double(), condition])
    gate = torch.softmax(model.gate_out[part].double() @ torch.relu(model.gate_in[part].double() @ u), 0)
    total = torch.zeros_like(u)
    for refiner in range(model.num_refiners):
        v = u
        for block in range(model.refiner_depth):
            hidden = torch.relu(model.refiner_in[part, block, refiner].double() @ v)
            v = v + model.refiner_out[part, block, refiner].double() @ hidden
        total = total + gate[refiner] * v
    return total


@torch.no_grad()
def decode_sequentially(model: RQMoE, codes: torch.Tensor) -> torch.Tensor:
    """One vector and one stage after the other, float64."""
    decoded = []
    for code in codes.tolist():
        reconstruction = torch.zeros(model.vector_dim, dtype=torch.float64)
        instruction = torch.zeros_like(reconstruction)
        for stage, index in enumerate(code):
            condition = instruction if model.conditioning == "instruction" else reconstruction
            reconstruction = reconstruction + reference_codeword(model, stage, index, condition)
            if model.conditioning == "instruction" and stage < model.num_stages - 1:
                instruction = instruction + model.instructions[stage, index].double()
        decoded.append(reconstruction * model.scale.double() + model.mean.double())
    return torch.stack(decoded)


def mean_error(model: RQMoE, vectors: torch.Tensor, **options: int) -> float:
    return float((vectors - model.decode(model.encode(vectors, **options))).square().sum(1).mean())


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("conditioning", ["instruction", "reconstruction"])
@pytest.mark.parametrize("table_bytes", [0, 1 << 20])
def test_decoding_in_parallel_equals_decoding_in_sequence(
    depth: int, conditioning: str, table_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rq_moe, "_DECODING_BYTES", table_bytes)
    model = perturbed(untrained(depth, conditioning=conditioning))
    codes = torch.randint(8, (20, 4), generator=torch.Generator().manual_seed(1))
    for stages in (1, 2, 4):
        expected = decode_sequentially(model, codes[:, :stages])
        torch.testing.assert_close(model.decode(codes[:, :stages]).double(), expected, rtol=1e-5, atol=1e-5)


def test_decoding_follows_a_change_of_the_parameters() -> None:
    model, codes = untrained(), torch.zeros(2, 4, dtype=torch.uint8)
    before = model.decode(codes)
    expected = decode_sequentially(perturbed(model), codes)
    assert not torch.equal(model.decode(codes), before)
    torch.testing.assert_close(model.decode(codes).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("beam", "stages"), [(1, 4), (3, 4), (3, 2), (3, 1)])
@torch.no_grad()
def test_encoding_searches_over_the_codewords_of_the_equations(beam: int, stages: int) -> None:
    model = perturbed(untrained(depth=2))
    vectors = mixture(12, seed=2)
    codes = model.encode(vectors, beam=beam, num_stages=stages)
    normalised = (vectors.double() - model.mean.double()) / model.scale.double()
    for vector, code in zip(normalised, codes.tolist(), strict=True):
        zero = torch.zeros(6, dtype=torch.float64)
        partial = [((), zero, zero)]
        for stage in range(stages):
            grown = []
            for path, total, instruction in partial:
                for j in range(8):
                    advanced = instruction + model.instructions[stage, j].double() if stage < 3 else instruction
                    grown.append(((*path, j), total + reference_codeword(model, stage, j, instruction), advanced))
            partial = sorted(grown, key=lambda item: float((vector - item[1]).square().sum()))[:beam]
        assert code == list(partial[0][0])


@pytest.mark.parametrize("beam", [1, 4])
def test_zero_instruction_and_identity_refiners_are_plain_residual_quantization(beam: int) -> None:
    vectors = mixture(300, seed=3)
    model = perturbed(untrained(depth=2))
    with torch.no_grad():
        model.instructions.zero_()
        model.refiner_out.zero_()
        model.projection[:, :, :6] = torch.eye(6)
    normalised = (vectors - model.mean) / model.scale
    expected = residual_encode(normalised, model.codebooks.detach(), beam=beam)
    codes = model.encode(vectors, beam=beam)
    assert torch.equal(codes.long(), expected)
    decoded = residual_decode(codes, model.codebooks.detach()) * model.scale + model.mean
    torch.testing.assert_close(model.decode(codes), decoded, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("conditioning", ["instruction", "reconstruction"])
def test_training_starts_at_plain_residual_quantization(conditioning: str) -> None:
    model, vectors = untrained(conditioning=conditioning), mixture(400)
    normalised = (vectors - model.mean) / model.scale
    codebooks = fit_residual_codebooks(normalised, 4, 8, iterations=5, seed=0)
    assert torch.equal(model.encode(vectors).long(), residual_encode(normalised, codebooks))


def test_training_starts_from_the_codebooks_it_is_given() -> None:
    vectors = mixture(400)
    codebooks = fit_residual_codebooks(vectors, 4, 8, iterations=2, seed=5)
    model = RQMoE(6, 4, 8, 3, 1, 5).fit(vectors, codebooks=codebooks, epochs=0)
    codes = model.encode(vectors)
    assert torch.equal(codes.long(), residual_encode(vectors, codebooks))
    torch.testing.assert_close(model.decode(codes), residual_decode(codes, codebooks), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("depth", [1, 2])
def test_conditioning_on_the_reconstruction_is_qinco(depth: int) -> None:
    model = perturbed(untrained(depth, refiners=1, conditioning="reconstruction"))
    qinco = QINCo.from_rq_moe(model)
    vectors = mixture(200, seed=4)
    codes = model.encode(vectors)
    assert torch.equal(codes.long(), qinco.encode(vectors))
    torch.testing.assert_close(model.decode(codes), qinco.decode(codes.long()), rtol=1e-5, atol=1e-5)


def test_qinco_refuses_another_model() -> None:
    with pytest.raises(ConfigError, match="reconstruction"):
        QINCo.from_rq_moe(untrained(refiners=1))


@pytest.mark.parametrize("conditioning", ["instruction", "reconstruction"])
def test_every_parameter_learns(conditioning: str) -> None:
    model = untrained(depth=2, conditioning=conditioning)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.fit(mixture(400), epochs=2, batch_size=100, kmeans_iterations=5, progress=False)
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, start[name]), name
        assert torch.isfinite(parameter).all()


def test_training_beats_plain_residual_quantization_on_unseen_vectors() -> None:
    vectors, unseen = mixture(4000, seed=5), mixture(1000, seed=6)
    plain = RQMoE(6, 3, 8, 2, 1, 8).fit(vectors, epochs=0, progress=False)
    trained = RQMoE(6, 3, 8, 2, 1, 8).fit(vectors, epochs=8, progress=False)
    assert mean_error(trained, unseen) < 0.8 * mean_error(plain, unseen)
    assert mean_error(trained, unseen, beam=4) <= mean_error(trained, unseen)
    codes = trained.encode(unseen)
    errors = [float((unseen - trained.decode(codes[:, :m])).square().sum()) for m in (1, 2, 3)]
    assert errors == sorted(errors, reverse=True)


@torch.no_grad()
def test_loss_is_the_normalised_residual_loss() -> None:
    model, vectors = perturbed(untrained(depth=2)), mixture(50, seed=7)
    normalised = (vectors - model.mean) / model.scale
    codes = model.encode(vectors).long()
    zero_mean = torch.zeros(6)
    model.mean.copy_(zero_mean)
    model.scale.fill_(1)
    before, expected = normalised.double().square().sum(1).mean(), 0.0
    for stages in (1, 2, 3, 4):
        residual = normalised.double() - decode_sequentially(model, codes[:, :stages])
        after = residual.square().sum(1).mean()
        expected, before = expected + torch.log1p(after / before), after
    gates = model._codewords(codes)[1].double()
    torch.testing.assert_close(gates.sum(2), torch.ones_like(gates.sum(2)))
    expected = expected + 0.01 * gates.mean(1).square().sum()
    torch.testing.assert_close(
        model._loss(normalised, torch.ones(50), codes, 0.01).double(), expected, rtol=1e-5, atol=1e-6
    )


def test_shortlist_of_all_codewords_is_the_exact_search_and_a_short_one_is_not() -> None:
    model, vectors = perturbed(untrained()), mixture(300, seed=8)
    exact = model.encode(vectors, beam=2)
    assert torch.equal(model.encode(vectors, beam=2, shortlist=8), exact)
    assert not torch.equal(model.encode(vectors, beam=2, shortlist=1), exact)


def test_chunks_do_not_change_the_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, vectors = perturbed(untrained()), mixture(100, seed=9)
    codes = model.encode(vectors, beam=2)
    decoded = model.decode(codes)
    monkeypatch.setitem(rq_moe._CHUNK_FLOATS, "cpu", 1 << 10)
    assert torch.equal(model.encode(vectors, beam=2), codes)
    torch.testing.assert_close(model.decode(codes), decoded)


def test_same_seed_same_bytes_and_a_file_restores_the_model(tmp_path: Path) -> None:
    vectors = mixture(400)
    for name in ("a", "b"):
        model = RQMoE(6, 3, 8, 2, 1, 4).fit(vectors, seed=3, epochs=2, progress=False)
        model.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    loaded = RQMoE.load(tmp_path / "a")
    assert loaded.config == model.config
    codes = model.encode(vectors)
    assert codes.dtype == torch.uint8 and codes.shape == (400, 3)
    assert torch.equal(loaded.encode(vectors), codes)
    assert torch.equal(loaded.decode(codes), model.decode(codes))


def test_one_stage_is_plain_vector_quantization() -> None:
    vectors = mixture(200)
    model = RQMoE(6, 1, 16, 2, 1, 4).fit(vectors, epochs=3, progress=False)
    normalised = (vectors - model.mean) / model.scale
    nearest = torch.cdist(normalised, model.codebooks[0].detach()).argmin(1)
    assert torch.equal(model.encode(vectors)[:, 0].long(), nearest)


def test_large_codebooks_and_empty_input() -> None:
    model = RQMoE(2, 2, 300, 1, 1, 2).fit(torch.randn(400, 2), epochs=0, kmeans_iterations=1, progress=False)
    assert model.encode(torch.randn(5, 2)).dtype == torch.int32
    assert model.encode(torch.empty(0, 2)).shape == (0, 2)
    assert model.decode(torch.empty(0, 2, dtype=torch.int32)).shape == (0, 2)


def test_bad_input() -> None:
    model = RQMoE(6, 3, 8, 2, 1, 4)
    with pytest.raises(ConfigError, match="fit or load"):
        model.encode(mixture(5))
    with pytest.raises(ConfigError, match="fit or load"):
        model.decode(torch.zeros(1, 3, dtype=torch.uint8))
    with pytest.raises(NumericalError, match="NaN"):
        model.fit(torch.full((20, 6), torch.nan))
    with pytest.raises(ConfigError, match="7 vectors cannot train 8 codewords"):
        model.fit(mixture(7))
    with pytest.raises(ConfigError, match=r"\[20, 5\], expected \[n, 6\]"):
        model.fit(mixture(20, dim=5))
    with pytest.raises(ConfigError, match=r"\[2, 8, 6\], expected \[3, 8, 6\]"):
        model.fit(mixture(20), codebooks=torch.zeros(2, 8, 6))
    model = untrained()
    with pytest.raises(ConfigError, match=r"1\.\.4"):
        model.encode(mixture(5), num_stages=5)
    with pytest.raises(NumericalError, match="NaN"):
        model.encode(torch.tensor([[torch.inf] * 6]))
    with pytest.raises(ConfigError, match="beam"):
        model.encode(mixture(5), beam=0)
    with pytest.raises(ConfigError, match="expected"):
        model.decode(torch.zeros(1, 5, dtype=torch.uint8))
    with pytest.raises(ConfigError, match=r"0\.\.7"):
        model.decode(torch.full((1, 4), 8, dtype=torch.uint8))
    with pytest.raises(ConfigError, match="num_stages"):
        RQMoE(6, 0, 8, 2, 1, 4)
    with pytest.raises(ConfigError, match="conditioning"):
        RQMoE(6, 2, 8, 2, 1, 4, conditioning="codes")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(CheckpointError, match="not a readable"):
        RQMoE.load(path)
    path.write_bytes(b"no safetensors")
    with pytest.raises(CheckpointError, match="not a readable"):
        RQMoE.load(path)
    save_file({"codebooks": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="metadata"):
        RQMoE.load(path)
    with pytest.raises(ConfigError, match="fit or load"):
        RQMoE(6, 3, 8, 2, 1, 4).save(path)

    untrained().save(path)
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        (key, config), *_ = file.metadata().items()
    other_version = json.dumps(json.loads(config) | {"format_version": 2})
    save_file(tensors, path, metadata={key: other_version})
    with pytest.raises(CheckpointError, match="version 2"):
        RQMoE.load(path)
    del tensors["gate_in"]
    save_file(tensors, path, metadata={key: config})
    with pytest.raises(CheckpointError, match="gate_in"):
        RQMoE.load(path)


def test_documented_snippet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = Path(__file__).resolve().parent.parent / "docs" / "rq_moe.md"
    (snippet,) = re.findall(r"```python\n(.*?)```", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(snippet, names)
    vectors, quantizer = names["vectors"], names["quantizer"]
    assert names["codes"].shape == (2000, 4) and names["codes"].dtype == torch.uint8
    assert names["short"].shape == (2000, 2)
    errors = [float((vectors - quantizer.decode(names[name])).square().mean()) for name in ("better", "codes", "short")]
    assert errors == sorted(errors)
    torch.testing.assert_close(names["decoded"], names["same"].decode(names["codes"]))
