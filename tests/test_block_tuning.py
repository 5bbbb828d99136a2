import dataclasses

import pytest
import torch
from packed_banks import random_projection
from quantizing import quantize
from tiny_models import save_tiny_model

from kbvq.codes.packing import dequantize_expert
from kbvq.quantization.block_tuning import TrainableProjection, windows_per_step
from kbvq.recipes import make_recipe
from kbvq.structures import ProjectionFormat

FORMATS = [
    ProjectionFormat(3, 8, 12, "vq", 4, 256, has_scale=True, has_bias=True),
    ProjectionFormat(3, 8, 12, "vq", 4, 4096, num_codebooks=3),
    ProjectionFormat(2, 6, 16, "rq", 8, 256, num_stages=2, has_scale=True, rank=2),
    ProjectionFormat(2, 6, 16, "rq", 8, 256, num_stages=2, num_codebooks=2, has_bias=True, rank=3, factor_dtype="int8"),
    ProjectionFormat(2, 6, 16, "vq", 8, 256, has_scale=True, signed=True, codebook_dtype="int8", has_column_scale=True),
    ProjectionFormat(
        2, 6, 16, "rq-grouped", 8, 256, num_stages=3, num_groups=4, num_codebooks=2, codebook_dtype="int8"
    ),
    ProjectionFormat(2, 8, 16, "trellis", 1, 4, has_scale=True, has_bias=True, rank=2),
]


@pytest.mark.parametrize("format", FORMATS)
def test_trainable_weights_are_the_decoded_ones_and_pack_to_the_same(format):
    packed, _ = random_projection(format, seed=0)
    trainable = TrainableProjection(packed)
    decoded = torch.stack([dequantize_expert(format, packed.tensors, e) for e in range(format.num_experts)])
    torch.testing.assert_close(trainable.weights().detach(), decoded, rtol=1e-5, atol=1e-6)
    again = trainable.pack()
    for name, tensor in packed.tensors.items():
        if "codebook" not in name or format.codebook_dtype == "float16":
            assert torch.equal(again.tensors[name], tensor), name
    # An int8 table is scaled to its largest value anew: half a step of rounding, twice.
    decoded_again = torch.stack([dequantize_expert(format, again.tensors, e) for e in range(format.num_experts)])
    torch.testing.assert_close(decoded_again, decoded, rtol=0, atol=0.02 if format.codebook_dtype == "int8" else 0)


def test_gradients_reach_everything_that_is_continuous():
    packed, _ = random_projection(FORMATS[0], seed=0)
    trainable = TrainableProjection(packed)
    (trainable.weights().square().sum() + trainable.bias().square().sum()).backward()
    assert {name for name, p in trainable.continuous.items() if p.grad.any()} == {"codebook", "scale", "bias"}


@pytest.mark.parametrize("scales", [("scale", "column_scale"), ("scale",), ("column_scale",)])
def test_gradients_of_the_scales_of_fixed_codes_are_those_of_the_product(scales):
    """Against autograd on the product, its fixed part taken from the decoder with all scales at one."""
    has = {f"has_{name}": name in scales for name in ("scale", "column_scale")}
    format = ProjectionFormat(3, 8, 16, "trellis", 1, 4, rank=2, **has)
    packed, _ = random_projection(format, seed=0)
    ones = {name: torch.ones_like(packed.tensors[name]) for name in scales}
    fixed = torch.stack([dequantize_expert(format, packed.tensors | ones, e) for e in range(3)])
    wanted = torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(1))
    own = {name: packed.tensors[name].float().requires_grad_() for name in scales}
    product = fixed * own.get("scale", torch.ones(3, 8))[..., None] * own.get("column_scale", torch.ones(16))
    (product * wanted).sum().backward()
    trainable = TrainableProjection(packed)
    (trainable.weights() * wanted).sum().backward()
    for name in scales:
        torch.testing.assert_close(trainable.continuous[name].grad, own[name].grad, rtol=1e-5, atol=1e-5)


def test_windows_per_step_fill_the_tokens_of_a_step():
    assert windows_per_step(256, 128) == 8
    assert windows_per_step(256, 3) == 3
    assert windows_per_step(4096, 128) == 1


@pytest.mark.parametrize("arch", ["qwen2_moe", "deepseek_v3"])
def test_tuning_lowers_the_layers_output_error_and_is_reproducible(tmp_path, text, arch):
    save_tiny_model(tmp_path / "model", arch)
    recipe = make_recipe("default", 2, kmeans_iterations=5, budget=False)
    tuned = dataclasses.replace(recipe, tuning_steps=60)
    records = {
        name: quantize(tmp_path / "model", tmp_path / name, text, chosen)
        for name, chosen in (("default", recipe), ("tuned", tuned), ("again", tuned))
    }
    first = next(layer["layer"] for layer in records["default"]["layers"] if layer["banks"])
    errors = {name: record["layers"][first]["output_error"] for name, record in records.items()}
    assert errors["tuned"] < 0.97 * errors["default"]
    assert records["tuned"]["bits_per_weight"] == records["default"]["bits_per_weight"]
    manifests = {name: (tmp_path / name / "kbvq_manifest.json").read_bytes() for name in records}
    assert manifests["tuned"] == manifests["again"] != manifests["default"]
