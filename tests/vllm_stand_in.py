"""What the plugin touches of vLLM, for tests where vLLM cannot be installed: the names, the calls and their order.

`installed()` puts it into sys.modules. `RoutedExperts` makes its parameters through the quantization method, hands out
stored tensors as vLLM does, and runs the experts with a routing that is given to it.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from unittest.mock import patch

import torch
from torch import nn

registered: dict[str, type] = {}


class QuantizeMethodBase(ABC):
    @abstractmethod
    def create_weights(self, layer, *weight_args, **extra_weight_attrs): ...

    @abstractmethod
    def apply(self, layer, *args, **kwargs): ...


class QuantizationConfig(ABC):
    def __init__(self):
        self.packed_modules_mapping = {}

    @abstractmethod
    def get_name(self): ...

    @abstractmethod
    def get_supported_act_dtypes(self): ...

    @classmethod
    @abstractmethod
    def get_min_capability(cls): ...

    @staticmethod
    @abstractmethod
    def get_config_filenames(): ...

    @classmethod
    @abstractmethod
    def from_config(cls, config): ...

    @abstractmethod
    def get_quant_method(self, layer, prefix): ...


class FusedMoEMethodBase(QuantizeMethodBase):
    def __init__(self, moe):
        super().__init__()
        self.moe = moe

    @abstractmethod
    def get_fused_moe_quant_config(self, layer): ...


class LinearBase(nn.Module):
    pass


class UnquantizedLinearMethod:
    pass


@dataclass
class ParallelConfig:
    tp_size: int = 1
    use_ep: bool = False


@dataclass
class MoEConfig:
    num_experts: int
    hidden_dim: int
    intermediate_size: int
    activation: str = "silu"
    moe_parallel_config: ParallelConfig = field(default_factory=ParallelConfig)


class RoutedExperts(nn.Module):
    def __init__(self, layer_name, moe_config, quant_config, *, apply_router_weight_on_input=False, swiglu_limit=None):
        super().__init__()
        self.layer_name, self.moe_config, self.activation = layer_name, moe_config, moe_config.activation
        self.apply_router_weight_on_input, self.swiglu_limit = apply_router_weight_on_input, swiglu_limit
        self.quant_method = quant_config.get_quant_method(self, layer_name)
        self.quant_method.create_weights(
            layer=self,
            num_experts=moe_config.num_experts,
            hidden_size=moe_config.hidden_dim,
            unpadded_hidden_size=moe_config.hidden_dim,
            intermediate_size_per_partition=moe_config.intermediate_size,
            params_dtype=torch.bfloat16,
            weight_loader=None,
            global_num_experts=moe_config.num_experts,
        )

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[str]:
        """weights: by their names below the experts. Fused tensors, those of three dimensions, go out expert by expert,
        those of gate_up_proj in halves of their second dimension; others whole, for each part of the projection."""
        parts = [("gate_up_proj", "w13_weight", "w1"), ("gate_up_proj", "w13_weight", "w3")]
        parts.append(("down_proj", "w2_weight", "w2"))
        for name, tensor in weights:
            for fused, own, shard in parts:
                if not name.startswith(fused):
                    continue
                parameter = getattr(self, own + name.removeprefix(fused))
                pieces = [tensor]
                if tensor.dim() == 3:
                    pieces = (tensor if shard == "w2" else tensor.chunk(2, dim=1)[shard == "w3"]).unbind()
                for expert, piece in enumerate(pieces):
                    loaded = parameter.weight_loader(
                        param=parameter,
                        loaded_weight=piece,
                        weight_name=f"{self.layer_name}.{own}{name.removeprefix(fused)}",
                        shard_id=shard,
                        expert_id=expert,
                        return_success=True,
                    )
                    if loaded:
                        yield own + name.removeprefix(fused)

    def forward(self, x, topk_weights, topk_ids):
        return self.quant_method.apply(
            layer=self,
            x=x,
            topk_weights=topk_weights,
            topk_ids=topk_ids,
            shared_experts=None,
            shared_experts_input=None,
        )


def register_quantization_config(name):
    def register(config_class):
        assert issubclass(config_class, QuantizationConfig)
        registered[name] = config_class
        return config_class

    return register


@contextmanager
def installed():
    """vLLM can be imported until the block is left, and so can the plugin."""
    contents = {
        "fused_moe": dict(FusedMoEMethodBase=FusedMoEMethodBase, RoutedExperts=RoutedExperts),
        "linear": dict(LinearBase=LinearBase, UnquantizedLinearMethod=UnquantizedLinearMethod),
        "quantization": dict(register_quantization_config=register_quantization_config),
        "quantization.base_config": dict(QuantizationConfig=QuantizationConfig),
    }
    names = ["vllm", "vllm.model_executor", "vllm.model_executor.layers"]
    modules = {name: ModuleType(name) for name in names}
    for name, attributes in contents.items():
        module = modules[f"{names[-1]}.{name}"] = ModuleType(name)
        vars(module).update(attributes)
    with patch.dict(sys.modules, modules):
        yield
    sys.modules.pop("kbvq_vllm", None)
    registered.clear()
