"""rq-moe: the stored network against its equations value by value, its encoder, and the way to a loaded model."""

import json

import pytest
import torch
from packed_banks import random_bank, random_projection, reference_weight, rq_moe_vector, write_packed
from quantizing import quantize
from tiny_models import save_tiny_model
from transformers import AutoModelForCausalLM

import kbvq_kernels
from kbvq.codes.codebooks import NetworkCodebook
from kbvq.codes.packing import dequantize_expert, expand, new_network, store_network
from kbvq.errors import CheckpointError, ConfigError
from kbvq.models.moe_adapters import find_expert_banks
from kbvq.recipes import make_recipe
from kbvq.storage.checkpoint import inspect_checkpoint
from kbvq.structures import PROJECTIONS, ProjectionFormat

EXPERTS, ROWS = 2, 24
TOKENS = torch.arange(2, 26)[None]


def format_of(dim=8, dtype="int8", width=16, rows=ROWS, **options):
    return ProjectionFormat(EXPERTS, rows, width, "rq-moe", dim, 256, 2, codebook_dtype=dtype, **options)


@pytest.fixture(scope="module")
def book():
    """The codebook of a trained network whose vectors have a mean and a scale of their own."""
    generator = torch.Generator().manual_seed(0)
    vectors = 0.3 + 0.1 * torch.randn(3000, 4, generator=generator) * torch.tensor([1.0, 2.0, 1.0, 0.5])
    format = format_of(4, "float16")
    return NetworkCodebook(format, new_network(format).fit(vectors, epochs=2, kmeans_iterations=3, progress=False))


def problem(rows=ROWS, seed=1):
    """Targets as those that the network has seen, a metric of each expert, mass."""
    generator = torch.Generator().manual_seed(seed)
    targets = 0.3 + 0.15 * torch.randn(EXPERTS, rows, 4, generator=generator)
    metric = torch.randn(EXPERTS, 4, 4, generator=generator).triu() + 2 * torch.eye(4)
    return targets, metric, 0.5 + torch.rand(EXPERTS, rows, generator=generator)


def errors(targets, values, metric):
    return ((targets - values).double() @ metric.double()).square().sum(-1)


@pytest.mark.parametrize("dim, dtype", [(8, "int8"), (8, "float16"), (4, "int8")])
def test_decoded_weights_are_what_the_network_makes_of_the_codes(dim, dtype):
    """Rounded once to float16 behind the codeword of stage 0, which is rounded too but made up for."""
    format = format_of(dim, dtype, has_scale=True, rank=2)
    packed, codes = random_projection(format, seed=3)
    _, tables = expand(format, packed.tensors)
    for expert in range(EXPERTS):
        expected = reference_weight(packed, codes, expert)
        allowed = float(tables["codebook"].abs().max()) * 2**-11 * packed.tensors["scale"][expert].double().abs()
        wrong = (dequantize_expert(format, packed.tensors, expert).double() - expected).abs()
        assert (wrong <= 1.01 * allowed[:, None] + 1e-5).all()
        assert expected.std() > 1e3 * wrong.std()


def test_the_expansion_has_every_pair_of_codes():
    format = format_of()
    packed, _ = random_projection(format, seed=4)
    expanded, tensors = expand(format, packed.tensors)
    assert {n: (t.shape, t.dtype) for n, t in tensors.items()} == {
        n: (s.shape, s.dtype) for n, s in expanded.tensors().items()
    }
    assert tensors["groups"][0].tolist() == list(range(256))
    tables = tensors["codebook"][0].double()
    for first, second in torch.randint(256, (60, 2), generator=torch.Generator().manual_seed(5)).tolist():
        vector = tables[0, first] + tables[1 + first, second]
        expected = rq_moe_vector(format, packed.tensors, first, second)
        torch.testing.assert_close(vector, expected, rtol=0, atol=2**-11 * float(tables.abs().max()))
    assert expand(expanded, tensors)[0] == expanded  # nothing is left to expand


def test_every_byte_is_a_code_and_a_damaged_network_stays_finite():
    """What a crafted file may hold: the last pair of codes in the last place, served as the equations say; matrices of
    the largest numbers there are, which leave the range of float16 but not the tables."""
    packed, _ = random_projection(format_of(rows=16), seed=8)
    packed.tensors["codes"].fill_(255)
    expected = rq_moe_vector(packed.format, packed.tensors, 255, 255).repeat(EXPERTS, 16, 2)
    form, tensors = expand(packed.format, packed.tensors)
    served = kbvq_kernels.dequantize(kbvq_kernels.prepare(tensors, **form.to_dict()))
    torch.testing.assert_close(served.double(), expected, rtol=0, atol=2**-10 * float(expected.abs().max()))
    packed.tensors["network"].fill_(torch.finfo(torch.float16).max)
    assert expand(packed.format, packed.tensors)[1]["codebook"].isfinite().all()


def test_the_stored_network_is_the_trained_one(book):
    """Mean and scale have gone into its tables and gates; float16 is all that differs."""
    codes = torch.randint(256, (500, 2), generator=torch.Generator().manual_seed(6))
    decoded = book.decode(codes.T[:, None])[0]
    torch.testing.assert_close(decoded, book.network.decode(codes), rtol=0, atol=2e-3 * float(decoded.abs().max()))


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_codes_are_close_to_the_best_of_all_pairs(book, spread):
    targets, metric, mass = problem()
    metric = torch.eye(4) + spread * (metric - torch.eye(4))
    codes = book.encode(targets, metric, mass)
    found = errors(targets, book.decode(codes), metric)
    pairs = torch.cartesian_prod(torch.arange(256), torch.arange(256)).T[:, None]
    every = book.decode(pairs)[0]
    for expert in range(EXPERTS):
        best = errors(targets[expert][:, None], every, metric[expert]).amin(1)
        assert (found[expert] >= best - 1e-9).all()
        assert found[expert].sum() < 1.1 * best.sum()
    assert book.pack(codes[..., None])["network"].dtype == torch.float16


def test_a_refit_lowers_the_weighted_error_of_its_codes_and_leaves_the_old_network(book):
    targets, metric, mass = problem(rows=2000, seed=2)
    book = NetworkCodebook(format_of(4, "float16", width=4, rows=2000), book.network)
    codes = book.encode(targets, metric, mass)
    refit = book.refit()
    refit.add(codes, targets, metric, mass)
    before = (errors(targets, book.decode(codes), metric) * mass).sum()
    stored = {name: tensor.clone() for name, tensor in store_network(book.network, "float16").items()}
    after = (errors(targets, refit.solve().decode(codes), metric) * mass).sum()
    assert after < 0.97 * before
    again = store_network(book.network, "float16")
    assert all(torch.equal(again[name], tensor) for name, tensor in stored.items())


@pytest.mark.parametrize("shares", [[slice(0, 2)], [slice(0, 1), slice(1, 2)], [slice(0, 0), slice(0, 2)]])
def test_the_sample_of_a_refit_is_even_and_the_same_whoever_codes_the_experts(book, monkeypatch, shares):
    monkeypatch.setattr("kbvq.codes.codebooks.REFIT_VECTORS", 30)  # of 192: every seventh
    targets, metric, mass = problem(seed=3)
    codes = book.encode(targets, metric, mass)
    sums = []
    for own in shares:
        refit = book.refit()
        refit.begin(own.start)
        for _ in range(4):  # as many vectors as the format has
            refit.add(codes[:, own], targets[own], metric[own], mass[own])
        sums.append(refit.sums)
    vectors, chosen, metrics = (sum(parts[1:], start=parts[0]) for parts in zip(*sums, strict=True))
    rows = torch.arange(0, 4 * EXPERTS * ROWS, 7) % (EXPERTS * ROWS)
    torch.testing.assert_close(vectors, targets.flatten(0, 1)[rows])
    assert torch.equal(chosen, codes.flatten(1).T[rows])
    expected = metric[rows // ROWS] * mass.flatten()[rows].sqrt()[:, None, None]
    torch.testing.assert_close(metrics, expected)


@pytest.fixture(scope="module")
def run(tmp_path_factory, text):
    """(original model, folder of the packed one, record of the run)."""
    folder = tmp_path_factory.mktemp("rq_moe")
    model = save_tiny_model(folder / "model", "qwen3_moe", num_hidden_layers=1, num_experts=4)
    recipe = make_recipe("default", 2, codebook="rq-moe", budget=False, bcos=False, idre=False, kmeans_iterations=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kbvq.quantization.run_plan._CODED_WIDTH", 64)  # what it is timed on beforehand
        record = quantize(folder / "model", folder / "packed", text, recipe)
    return model, folder, record


def test_a_loaded_model_computes_with_the_network_of_its_checkpoint(run):
    """The reference is the family's own code with the weights that the equations make of codes and network."""
    original, folder, record = run
    loaded = AutoModelForCausalLM.from_pretrained(folder / "packed", dtype=torch.float32)
    assert record["bits_per_weight"] == inspect_checkpoint(folder / "packed")["bits_per_weight"]
    for bank in find_expert_banks(original):
        packed, dense = loaded.get_submodule(bank.path), original.get_submodule(bank.path)
        for projection in PROJECTIONS:
            format, tensors = packed.projection_format(projection), packed.projection_tensors(projection)
            assert format.codebook == "rq-moe" and tensors["network"].dtype.is_floating_point
            weights = torch.stack([dequantize_expert(format, tensors, e) for e in range(bank.num_experts)])
            row, vector = 3, 1
            codes = tensors["codes"][0, row, [vector, format.num_vectors + vector]].tolist()
            value = rq_moe_vector(format, tensors, *codes)
            columns = slice(vector * format.vector_dim, (vector + 1) * format.vector_dim)
            value *= tensors["scale"][0, row].double() * tensors["column_scale"][columns].double()
            torch.testing.assert_close(weights[0, row, columns].double(), value, rtol=2**-8, atol=1e-4)
            getattr(dense, projection).data = weights
    with torch.no_grad():
        torch.testing.assert_close(loaded(TOKENS).logits, original(TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_saved_again_and_loaded_it_gives_equal_logits(run, tmp_path):
    _, folder, _ = run
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(folder / "packed", dtype=torch.float32)
        expected = loaded(TOKENS).logits
        loaded.save_pretrained(tmp_path / "again")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
        assert torch.equal(again(TOKENS).logits, expected)


def test_what_rq_moe_has_not_is_refused_by_name_with_the_remedy():
    with pytest.raises(ConfigError, match="third stage.*--codebook rq-grouped"):
        make_recipe("default", 3, codebook="rq-moe", budget=False)
    with pytest.raises(ConfigError, match="--codebook-scope bank"):
        make_recipe("paper", 2, codebook="rq-moe")
    with pytest.raises(ConfigError, match="one network for all experts, not 2"):
        format_of(num_codebooks=EXPERTS)
    for old in ({"num_groups": 8}, {"num_stages": 3}, {"num_stages": 1}, {"codebook_size": 4096}):
        fields = format_of().to_dict() | old
        with pytest.raises(ConfigError, match="named rq-grouped since"):
            ProjectionFormat(**fields)


def test_a_checkpoint_with_tables_under_the_old_name_is_refused_and_reads_under_the_new_one(tmp_path):
    source = save_tiny_model(tmp_path / "model", "qwen3_moe")
    options = {"codebook": "rq-grouped", "vector_dim": 8, "num_stages": 2, "num_groups": 8}
    banks = [
        random_bank(bank.path, bank.kind, bank.num_experts, bank.hidden_size, bank.intermediate_size, seed=1, **options)
        for bank in find_expert_banks(source)
    ]
    write_packed(tmp_path / "model", tmp_path / "packed", source, banks)
    path = tmp_path / "packed" / "config.json"
    content = path.read_text()
    path.write_text(content.replace("rq-grouped", "rq-moe"))
    assert json.loads(path.read_text())["quantization_config"]["banks"][0]["down_proj"]["codebook"] == "rq-moe"
    for read in (AutoModelForCausalLM.from_pretrained, inspect_checkpoint):
        with pytest.raises((ConfigError, CheckpointError), match="named rq-grouped since .* config.json"):
            read(tmp_path / "packed")
    path.write_text(content)
    AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
