import pytest
import torch
from quantizing import quantize
from safetensors.torch import load_file
from tiny_models import save_tiny_model

from kbvq.errors import ConfigError
from kbvq.method.bias_correction import SLOPE_LIMITS, bias_correction, output_moments
from kbvq.recipes import make_recipe


def tokens(count=500, width=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator) @ torch.randn(width, width, generator=generator) + 3.0


def test_output_moments_are_those_of_the_outputs():
    inputs, weight = tokens(), torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    outputs = inputs.double() @ weight.double().T
    mean, deviation = output_moments(weight, inputs.T @ inputs / len(inputs), inputs.mean(0))
    torch.testing.assert_close(mean.double(), outputs.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(deviation.double(), outputs.std(0, correction=0), rtol=1e-3, atol=1e-3)


def test_corrected_outputs_have_the_teachers_mean_and_deviation():
    inputs, generator = tokens(), torch.Generator().manual_seed(2)
    weight = torch.randn(5, 6, generator=generator)
    quantized = 0.8 * weight + 0.1 * torch.randn(5, 6, generator=generator)
    moments = (inputs.T @ inputs / len(inputs), inputs.mean(0))
    slope, bias = bias_correction(output_moments(weight, *moments), output_moments(quantized, *moments))
    corrected, outputs = (inputs @ quantized.T) * slope + bias, inputs @ weight.T
    torch.testing.assert_close(corrected.mean(0), outputs.mean(0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(corrected.std(0), outputs.std(0), rtol=1e-3, atol=1e-3)


def test_either_half_of_the_correction_is_stored_alone(tmp_path, text):
    save_tiny_model(tmp_path / "original", "qwen3_moe")
    stored = {}
    for part in ("mean", "variance"):
        recipe = make_recipe("paper", 2, kmeans_iterations=1, idre=False, bcos_part=part)
        quantize(tmp_path / "original", tmp_path / part, text, recipe)
        files = sorted((tmp_path / part).glob("*.safetensors"))
        stored[part] = {name: tensor for file in files for name, tensor in load_file(file).items()}
    scales = [tensor for name, tensor in stored["mean"].items() if name.endswith("_proj_scale")]
    assert scales and all(bool((scale == 1).all()) for scale in scales)
    assert any(name.endswith("_proj_bias") for name in stored["mean"])
    assert not any(name.endswith("_proj_bias") for name in stored["variance"])
    assert any(bool((t != 1).any()) for name, t in stored["variance"].items() if name.endswith("_proj_scale"))
    with pytest.raises(ConfigError, match="no budget"):
        make_recipe("default", 2, bcos_part="mean")


def test_a_channel_without_variance_keeps_its_slope_and_extremes_are_bounded():
    teacher = (torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 1.0]))
    student = (torch.tensor([0.5, 0.0, 0.0]), torch.tensor([0.0, 0.01, 1000.0]))
    slope, bias = bias_correction(teacher, student)
    assert slope.tolist() == [1.0, SLOPE_LIMITS[1], torch.tensor(SLOPE_LIMITS[0]).item()]
    assert bias.tolist() == [1.5, 1.0, 0.0]
