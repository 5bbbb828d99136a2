import torch

from kbvq.method.bias_correction import SLOPE_LIMITS, bias_correction, output_moments


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


def test_a_channel_without_variance_keeps_its_slope_and_extremes_are_bounded():
    teacher = (torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 1.0]))
    student = (torch.tensor([0.5, 0.0, 0.0]), torch.tensor([0.0, 0.01, 1000.0]))
    slope, bias = bias_correction(teacher, student)
    assert slope.tolist() == [1.0, SLOPE_LIMITS[1], torch.tensor(SLOPE_LIMITS[0]).item()]
    assert bias.tolist() == [1.5, 1.0, 0.0]
