"""Packed routed experts of kbvq checkpoints in vLLM, as a plugin that lives outside of it.

vLLM calls `register` in each of its processes (entry point group vllm.general_plugins). From then on a checkpoint whose
quantization_config says `kbvq` is read by `KbvqVllmConfig`, and `KbvqMoEMethod` holds and runs the routed experts of a
layer. Everything else of the model is vLLM's own. README.md beside this file says what of that was run.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from kbvq.errors import CheckpointError, UnsupportedModelError
from kbvq.models.expert_forward import gated
from kbvq.serving.hf import QUANT_METHOD, KbvqConfig
from kbvq.serving.packed_experts import PackedBankModule, packed_module
from kbvq.structures import PROJECTIONS, BankFormat, buffer_name

_VLLM_NAMES = {"gate_up_proj": "w13_weight", "down_proj": "w2_weight"}
"""What vLLM calls a fused projection, whose other tensors (`gate_up_proj_codebook`) it renames along with it."""


class KbvqVllmConfig(QuantizationConfig):
    """The quantization_config of a packed checkpoint.

    Raises ConfigError for one that this kbvq cannot read, UnsupportedModelError for one that packs more than routed
    experts, or gives experts rates of their own: vLLM has no place for those tensors.
    """

    def __init__(self, config: KbvqConfig) -> None:
        super().__init__()
        formats = config.bank_formats()
        others = [bank.path for bank in formats if bank.kind != "routed"]
        others += [matrix.path for matrix in config.matrix_formats()]
        if others:
            raise UnsupportedModelError(
                f"the checkpoint packs {others[0]} ({len(others)} such modules), the vLLM plugin serves routed experts "
                "only; load it with transformers"
            )
        tiers = [bank.path for bank in formats if bank.experts]
        if tiers:
            raise UnsupportedModelError(
                f"the experts of {tiers[0]} have rates of their own, and vLLM's loader has no place for their tensors; "
                "load the checkpoint with transformers, or quantize with --set expert_rates=false"
            )
        self.banks = {bank.path: bank for bank in formats}

    @classmethod
    def get_name(cls) -> str:
        return QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80  # the Triton kernels multiply in bfloat16

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # it is in config.json

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> KbvqVllmConfig:
        return cls(KbvqConfig(**config))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """prefix: path of the layer in vLLM's model; for models that vLLM builds like transformers that of the bank."""
        if isinstance(layer, LinearBase):
            return UnquantizedLinearMethod()
        if not isinstance(layer, RoutedExperts):
            return None
        path = prefix.removesuffix(".routed_experts")
        if path not in self.banks:
            raise CheckpointError(
                f"vLLM's model has experts at {path}, the checkpoint packs those at {', '.join(self.banks)}; this "
                "architecture is not served by the plugin"
            )
        return KbvqMoEMethod(layer.moe_config, self.banks[path])


class KbvqMoEMethod(FusedMoEMethodBase):
    """Packed routed experts of one layer.

    The stored tensors are parameters of vLLM's layer, so that its loader finds them and moves them to the device; a
    `PackedExperts` of kbvq works on the same memory.

    Raises UnsupportedModelError for experts that are split over processes: codes of a row depend on one another.
    """

    def __init__(self, moe: Any, format: BankFormat) -> None:
        super().__init__(moe)
        self.format = format
        parallel = moe.moe_parallel_config
        if parallel.tp_size > 1 or parallel.use_ep:
            raise UnsupportedModelError(
                f"{format.path}: packed experts are not split over processes; start vLLM with "
                "--tensor-parallel-size 1 and without expert parallelism"
            )

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """Parameters of `layer` for all stored tensors. Raises CheckpointError when the checkpoint's format describes
        experts of another size, UnsupportedModelError for a computation that kbvq does not know."""
        format = self.format
        shape = (num_experts, hidden_size, intermediate_size_per_partition)
        packed = (format.down_proj.num_experts, format.down_proj.out_features, format.down_proj.in_features)
        if packed != shape or format.gate_up_proj.out_features != 2 * packed[2]:
            raise CheckpointError(
                f"{format.path}: vLLM has {list(shape)} experts, hidden size and intermediate size there, the packed "
                f"format {list(packed)}; config.json and the checkpoint do not belong together"
            )
        activation = str(getattr(layer.activation, "value", layer.activation))
        limits = [name for name in ("swiglu_limit", "swiglu_alpha", "swiglu_beta") if getattr(layer, name, None)]
        if activation != "silu" or layer.apply_router_weight_on_input or limits:
            raise UnsupportedModelError(
                f"{format.path}: the plugin computes down(silu(gate) * up), this model wants "
                f"{', '.join([activation, *limits])}"
                + (" with the routing weights on the inputs" if layer.apply_router_weight_on_input else "")
            )
        self.module: PackedBankModule = packed_module(format, gated(F.silu), "silu").eval()
        self.loaded: dict[str, int] = {}
        for projection in PROJECTIONS:
            for name, buffer in self.module.projection_tensors(projection).items():
                parameter = nn.Parameter(buffer, requires_grad=False)
                parameter.weight_loader = self._load  # type: ignore[attr-defined]
                layer.register_parameter(_parameter_name(projection, name), parameter)

    def _load(
        self,
        param: nn.Parameter,
        loaded_weight: Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        """Takes a stored tensor in the pieces in which vLLM hands out fused experts.

        Tensors with three dimensions come expert by expert, those of gate_up_proj in two halves of the rest (w1, w3);
        all others whole, once or twice.
        """
        target = param.data
        if target.dim() == 3:
            target = target[expert_id]
            if shard_id != "w2":
                target = target.chunk(2)[0 if shard_id == "w1" else 1]
        if target.shape != loaded_weight.shape or target.dtype != loaded_weight.dtype:
            raise CheckpointError(
                f"{weight_name} ({shard_id} of expert {expert_id}) is stored as {list(loaded_weight.shape)} "
                f"{loaded_weight.dtype}, its format says {list(target.shape)} {target.dtype}; fetch it again"
            )
        target.copy_(loaded_weight)
        name = weight_name.rpartition(".")[2]
        self.loaded[name] = self.loaded.get(name, 0) + target.numel()
        return True if return_success else None

    def process_weights_after_loading(self, layer: Any) -> None:
        """Raises CheckpointError naming a tensor that did not come, or came in part: zeros would be wrong experts."""
        for projection in PROJECTIONS:
            for name in self.module.projection_tensors(projection):
                own = _parameter_name(projection, name)
                parameter = getattr(layer, own)
                if self.loaded.get(own, 0) < parameter.numel():
                    raise CheckpointError(
                        f"{self.format.path}: {own} was not loaded ({self.loaded.get(own, 0)} of {parameter.numel()} "
                        "values); fetch the checkpoint again"
                    )
                # vLLM may have moved the parameters since: from here on the module reads where they are.
                self.module.register_buffer(buffer_name(projection, name), parameter.data)

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """None: the config of vLLM's own kernels, none of which runs here."""

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """x [T, H], topk_weights and topk_ids [T, k] -> [T, H]; shared experts are run by vLLM's runner."""
        return self.module(x, topk_ids, topk_weights)


def _parameter_name(projection: str, tensor: str) -> str:
    return _VLLM_NAMES[projection] + ("" if tensor == "codes" else f"_{tensor}")


def register() -> None:
    """Make the quantization method known to vLLM; repeated calls change nothing."""
    register_quantization_config(QUANT_METHOD)(KbvqVllmConfig)
