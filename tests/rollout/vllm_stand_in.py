"""Stand-ins for the parts of vLLM that vllm_weights.py reaches, so that a machine without a GPU can import it.

They do what vLLM 0.24 does: a linear layer asks the quantization for its method, has it make the weight and calls its
`apply`; registering keeps a class by its name. A model here has the names and fused projections of vLLM's Llama.
"""

import importlib
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, silu

WEIGHTS = "reasoner.rollout.vllm_weights"
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


class LinearMethodBase:
    pass


class UnquantizedLinearMethod(LinearMethodBase):
    def create_weights(
        self, layer: Any, width: int, outputs: list[int], *_: Any, params_dtype: torch.dtype, **attributes: Any
    ) -> None:
        weight = nn.Parameter(torch.empty(sum(outputs), width, dtype=params_dtype, device="meta"), requires_grad=False)
        layer.register_parameter("weight", weight)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(x, layer.weight, bias)


class QuantizationConfig:
    def __init__(self) -> None:
        self.packed_modules_mapping = PACKED


class LinearBase(nn.Module):
    """x [N, K] -> [N, O], of one or several matrices of the trainer's."""

    def __init__(self, config: Any, prefix: str, outputs: list[int], width: int, *, bias: bool, dtype: torch.dtype):
        super().__init__()
        self.quant_method = config.get_quant_method(self, prefix)
        sizes: Any = (width, outputs, width, sum(outputs))
        self.quant_method.create_weights(self, *sizes, params_dtype=dtype)
        empty = torch.empty(sum(outputs), dtype=dtype, device="meta")
        self.bias = nn.Parameter(empty, requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return self.quant_method.apply(self, x, self.bias)


class SiluAndMul(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return silu(gate) * up


class GeluAndMul(nn.Module):
    def __init__(self, approximate: str = "none"):
        super().__init__()
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return gelu(gate, approximate=self.approximate) * up


class MLP(nn.Module):
    """What vLLM's families make of these names."""

    gate_up_proj: LinearBase
    down_proj: LinearBase

    def __init__(self, activation: nn.Module):
        super().__init__()
        self.act_fn = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_up_proj(x)))


class Registry:
    """What a decorator of vLLM's was last given, by name."""

    def __init__(self) -> None:
        self.classes: dict[str, Any] = {}

    def __call__(self, name: str) -> Callable[[Any], Any]:
        def keep(cls: Any) -> Any:
            self.classes[name] = cls
            return cls

        return keep


def imported(patch: pytest.MonkeyPatch) -> tuple[Any, Registry]:
    """`vllm_weights` over the stand-ins, and the quantizations registered with it."""
    quantizations = Registry()

    def empty(name: str) -> type:
        return type(name, (), {})

    inside: dict[str, dict[str, Any]] = {
        "device_allocator.cumem": {"CuMemAllocator": empty("CuMemAllocator")},
        "model_executor.layers.activation": {"GeluAndMul": GeluAndMul, "SiluAndMul": SiluAndMul},
        "model_executor.layers.linear": {
            "LinearBase": LinearBase,
            "LinearMethodBase": LinearMethodBase,
            "UnquantizedLinearMethod": UnquantizedLinearMethod,
        },
        "model_executor.layers.quantization": {"register_quantization_config": quantizations},
        "model_executor.layers.quantization.base_config": {"QuantizationConfig": QuantizationConfig},
        "model_executor.layers.vocab_parallel_embedding": {
            "UnquantizedEmbeddingMethod": empty("UnquantizedEmbeddingMethod"),
            "VocabParallelEmbedding": empty("VocabParallelEmbedding"),
        },
        "model_executor.model_loader": {"register_model_loader": Registry()},
        "model_executor.model_loader.base_loader": {"BaseModelLoader": empty("BaseModelLoader")},
        "model_executor.model_loader.utils": {"initialize_model": None, "process_weights_after_loading": None},
        "model_executor.models": {"ModelRegistry": SimpleNamespace(models={})},
        "model_executor.utils": {"set_weight_attrs": lambda weight, attributes: None},
        "utils.torch_utils": {"set_default_torch_dtype": None},
        "v1.worker.gpu.model_states.default": {"DefaultModelState": empty("DefaultModelState")},
    }
    for path, values in inside.items():
        parts = path.split(".")
        for end in range(len(parts) + 1):
            name = ".".join(["vllm", *parts[:end]])
            if not isinstance(sys.modules.get(name), StandIn):
                patch.setitem(sys.modules, name, StandIn(name))
        vars(sys.modules[f"vllm.{path}"]).update(values)
    patch.delitem(sys.modules, WEIGHTS, raising=False)
    module = importlib.import_module(WEIGHTS)
    patch.delitem(sys.modules, WEIGHTS)  # what others import is not ours
    return module, quantizations


class StandIn(ModuleType):
    """A module of vLLM's that is not."""
