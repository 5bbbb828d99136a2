"""Every stage of a run on a device that is none but behaves like a GPU; see pretend_cuda for what it cannot see."""

import dataclasses
from collections import Counter

import pytest
import torch
from pretend_cuda import CUDA, DeviceError, is_marked, pretend_cuda
from quantizing import quantize
from safetensors.torch import load_file
from tiny_models import save_tiny_model

from kbvq.method.projection import quantize_projection
from kbvq.models.calibration import WatchedLinears
from kbvq.quantization import layer_quantization
from kbvq.recipes import make_recipe
from kbvq.structures import InputMoments


def test_the_device_refuses_what_a_gpu_refuses():
    with pretend_cuda():
        there, here = torch.ones(3, device="cuda"), torch.arange(3.0)
        assert there.device == CUDA and (there + 1).device == CUDA and torch.zeros_like(there).device == CUDA
        assert here.device.type == "cpu" and there.cpu().device.type == "cpu" and here.to(CUDA).device == CUDA
        assert not is_marked(here)
        with pytest.raises(DeviceError, match="two devices"):
            there + here
        with pytest.raises(DeviceError, match="two devices"):
            torch.cat([there, here])
        with pytest.raises(DeviceError, match="numpy"):
            there.numpy()
        with pytest.raises(DeviceError, match="generator"):
            torch.rand(3, device="cuda", generator=torch.Generator())
        with pytest.raises(DeviceError, match="forward passes only"):
            torch.linalg.cholesky(torch.eye(3, device="cuda", dtype=torch.bfloat16))
        # what CUDA allows: numbers, indices and copies from the CPU
        assert torch.equal((there * here[1]).cpu(), torch.ones(3))
        assert there[torch.tensor([0, 2])].device == CUDA
        here[:] = there
        assert not is_marked(here) and here.tolist() == [1, 1, 1]
        layer = torch.nn.Linear(3, 2).to("cuda")
        assert layer.weight.device == CUDA and layer(there).device == CUDA


def test_every_stage_runs_there_and_statistics_are_in_float32(tmp_path, text, monkeypatch):
    """Sensitivities, budget, matching, codes and correction, with activations in bfloat16."""
    save_tiny_model(tmp_path / "model", "mixtral")
    recipe = make_recipe("fast", 3, kmeans_iterations=1)
    expected = quantize(tmp_path / "model", tmp_path / "on-cpu", text, recipe, samples=2)
    seen = []

    def watched(weights, teacher, student, *rest, goal=None, **options):
        for gathered in (teacher, student, goal):
            if gathered is not None:
                named = {field.name: getattr(gathered, field.name) for field in dataclasses.fields(gathered)}
                seen.extend((name, t.dtype, t.device) for name, t in named.items() if name != "tokens")
        return quantize_projection(weights, teacher, student, *rest, goal=goal, **options)

    monkeypatch.setattr(layer_quantization, "quantize_projection", watched)
    with pretend_cuda() as device:
        found = quantize(tmp_path / "model", tmp_path / "on-gpu", text, recipe, samples=2, device="cuda")
    assert found["compute_dtype"] == "bfloat16" and expected["compute_dtype"] == "float32"
    # Of the original and the student for each projection of two layers; goals of all but the first layer's gate_up.
    moments = dict.fromkeys(("upper_sum", "input_sum", "weight_sum", "mass"), 2 * 2 * 2)
    assert Counter(name for name, *_ in seen) == moments | dict.fromkeys(("weights", "mean"), 3)
    assert {(dtype, where) for _, dtype, where in seen} == {(torch.float32, CUDA)}
    for ours, theirs in zip(found["layers"], expected["layers"], strict=True):  # the budget may choose other rates
        assert ours["output_error"] == pytest.approx(theirs["output_error"], rel=0.5)
    # The host waits for the device some times a projection and expert, and for none of a codeword, rate or rank: most
    # at the experts' weights in a forward pass, of which rates per expert take one more a layer, for what errors cost.
    ((place, most),) = device.waits.most_common(1)
    assert device.calls > 5000 and most <= 110, place


def test_end_to_end_tuning_runs_there_and_packs_what_it_tuned(tmp_path, text, monkeypatch):
    """The model's forward passes in bfloat16; values, gradients and moments of Adam, and the statistics of the matrices
    that are packed behind it, in float32."""
    save_tiny_model(tmp_path / "model", "mixtral", dtype=torch.bfloat16)
    fixed = {"budget": False, "matching": False, "kmeans_iterations": 1, "max_vectors_per_codeword": 8}
    recipe = make_recipe("fast", 2, distillation_steps=2, dense_rate=0.05, dense_bits=8, **fixed)
    seen, predicted, step = Counter(), Counter(), torch.optim.Adam.step
    in_backward, second_moment = Counter(), WatchedLinears.second_moment

    def watched(self, *arguments):
        # Dense parameters take their steps inside the backward pass, where devices are not seen.
        inside = torch._C._current_graph_task_id() != -1
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        given = [tensor for parameter in parameters for tensor in (parameter, parameter.grad)]
        result = step(self, *arguments)
        moments = [self.state[parameter][name] for parameter in parameters for name in ("exp_avg", "exp_avg_sq")]
        if inside:
            in_backward.update(tensor.dtype for tensor in (*given, *moments))
        else:
            seen.update((tensor.dtype, tensor.device) for tensor in given)
            seen.update((moment.dtype, parameters[0].device) for moment in moments)
        return result

    def measured(self, *arguments):
        found = second_moment(self, *arguments)
        predicted[found.dtype, found.device, torch.is_autocast_enabled("cpu")] += 1
        return found

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    monkeypatch.setattr(WatchedLinears, "second_moment", measured)
    with pretend_cuda() as device:
        found = quantize(tmp_path / "model", tmp_path / "on-gpu", text, recipe, samples=2, device="cuda")
    # Two Linears of attention in each of two layers (the others are too small), and the head, packed before tuning.
    assert predicted == {(torch.float32, CUDA, False): 5}
    assert seen.keys() == {(torch.float32, CUDA)} and seen[torch.float32, CUDA] > 2 * 4 * 4
    # Two steps of a parameter's four tensors: four Linears of attention and two norms in each of two layers.
    assert in_backward == {torch.float32: 2 * 4 * 2 * (4 + 2)}
    assert found["calibration"]["tuning_samples"] > 0
    ours, stored = (
        {k: v for file in sorted((tmp_path / name).glob("*.safetensors")) for k, v in load_file(file).items()}
        for name in ("on-gpu", "model")
    )
    norms = [name for name in ours if name.endswith("layernorm.weight")]
    assert len(norms) == 4
    for name in norms:  # two steps of Adam, of its rate where the gradients agree
        change = (ours[name].float() - stored[name].float()).abs() / stored[name].float().square().mean().sqrt()
        assert recipe.dense_rate / 5 < change.max() < 2.1 * recipe.dense_rate
    # Once for each tensor that is tuned and step of tuning, not for each window or expert.
    waits = [count for (file, _), count in device.waits.items() if file == "quantization/distillation.py"]
    assert max(waits) <= len(ours)


@pytest.mark.parametrize("bits", [2, 3])
def test_a_trellis_is_coded_there_as_on_the_cpu(bits):
    generator = torch.Generator().manual_seed(0)
    recipe = make_recipe("default", 2)
    weights, inputs = torch.randn(2, 24, 8, generator=generator), torch.randn(2, 40, 8, generator=generator)
    format = recipe.projection_format(2, 24, 8, bits=bits, rank=1)

    def coded(device):
        moments = InputMoments.zeros(2, 8, device)
        for expert in range(2):
            moments.add_(expert, inputs[expert].to(device), torch.ones(40, device=device))
        return quantize_projection(weights.to(device), moments, moments, format, recipe, seed=0).to("cpu")

    expected = coded("cpu")
    with pretend_cuda():
        found = coded("cuda")
    assert (found.tensors["codes"] == expected.tensors["codes"]).double().mean() > 0.9
