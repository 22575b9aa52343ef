# pyright: reportMissingImports=false
# (vLLM is there only on GPU machines.)
"""vLLM's model on the trainer's weights and adapter: nothing is copied, converted or allocated a second time.

Three extension points of vLLM do it. A *load format* makes vLLM's module on meta and gives each parameter a view of
`BaseWeights`. A *quantization* gives each linear layer a method of ours, which multiplies with the base, NF4 or 16-bit,
and adds the adapter from buffers that `EngineAdapter` refills in place: CUDA graphs read the new values. A *model
state* takes the penalties out of the sampler. vLLM's own LoRA stays off. Left out: experts, tensor parallelism.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from vllm.device_allocator.cumem import CuMemAllocator
from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.utils import set_weight_attrs
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from reasoner.models import nf4
from reasoner.models.base_model import EmptyOnMeta
from reasoner.models.base_weights import BaseWeights, padded_rows
from reasoner.rollout.hf import head_logits
from reasoner.rollout.vllm_adapter import AdapterPart, EngineAdapter

LOAD_FORMAT = "reasoner_shared"
QUANTIZATION = "reasoner"


class PlainMethod(UnquantizedLinearMethod):
    """x W^T + bias, then the adapter. Where the trainer kept rows for its A below W, one product gives both."""

    def __init__(self, part: AdapterPart | None):
        super().__init__()
        self.part = part

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.part is not None and self.part.matrix is not None:
            return self.part.joined(linear(x, self.part.matrix), bias)
        out = super().apply(layer, x, bias)
        return out if self.part is None else self.part.add_to(out, x)


class Nf4Method(LinearMethodBase):
    """The same over NF4: one matmul for a fused projection, where vLLM's own makes one for each part and a copy."""

    def __init__(self, part: AdapterPart | None, state: Any):
        self.part = part
        self.state = state
        # In 16 bits, where `Dequantized` holds it, and below it the adapter's A: one product gives both.
        self.matrix: Tensor | None = None

    def create_weights(  # the signature is vLLM's
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        assert (sum(output_partition_sizes), input_size_per_partition) == tuple(self.state.shape)
        packed = torch.empty(self.state.shape.numel() // 2, 1, dtype=torch.uint8)
        weight = nn.Parameter(packed, requires_grad=False)
        set_weight_attrs(weight, extra_weight_attrs)
        layer.register_parameter("weight", weight)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.matrix is None:
            out = nf4.matmul(x, cast(Tensor, layer.weight), self.state, bias)
            return out if self.part is None else self.part.add_to(out, x)
        if self.part is None:
            return linear(x, self.matrix, bias)
        return self.part.joined(linear(x, self.matrix), bias)


@dataclass(slots=True)
class Scores:
    """Where the head's scores of a step lie while `in_use`, float32 [sequences, vocabulary]: memory that comes and goes
    with the cache, where a CUDA graph's own would stay for good. None where vLLM loads weights of its own."""

    buffer: Tensor | None = None
    in_use: bool = False


class Float32Head(UnquantizedEmbeddingMethod):
    """The head's scores in float32, as the trainer has them: rounded to 16 bits they are a fifth of the mismatch."""

    def __init__(self, place: Scores):
        super().__init__()
        self.place = place

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        weight = cast(Tensor, layer.weight)
        if self.place.in_use and self.place.buffer is not None:
            out = self.place.buffer[: len(x), : len(weight)]
            scores = torch.mm(x, weight.T, out_dtype=torch.float32, out=out)
        else:
            scores = head_logits(x, weight)
        return scores if bias is None else scores + bias


class Dequantized:
    """The NF4 matrices of vLLM's module in 16 bits, in one buffer that comes and goes with the cache.

    From four bits every matrix is dequantized again for every token of more than a few sequences; from here they are
    read as they are, bit for bit the same. Below each lie the rows of the adapter's A's, so that a layer makes one
    product, not two. The buffer's address stays while it sleeps: CUDA graphs know it.
    """

    def __init__(self, model: nn.Module):
        methods = [(module, getattr(module, "quant_method", None)) for module in model.modules()]
        self.packed = [(cast(Tensor, m.weight), method) for m, method in methods if isinstance(method, Nf4Method)]
        shapes = [(method.state.shape[0] + extra_rows(method.part), method.state.shape[1]) for _, method in self.packed]
        sizes = [rows * columns for rows, columns in shapes]
        parts = _beside_the_cache(sum(sizes), torch.bfloat16).split(sizes)
        for (_, method), part, shape in zip(self.packed, parts, shapes, strict=True):
            method.matrix = part.view(shape)
        self.fill()

    def fill(self) -> None:
        """Write it anew, after its memory was away."""
        for data, method in self.packed:
            assert method.matrix is not None
            base, below = method.matrix.split([method.state.shape[0], extra_rows(method.part)])
            nf4.dequantize_into(data, method.state, base)
            below.zero_()
        self.take_adapter()

    def take_adapter(self) -> None:
        """Copy the A's as the engine's adapter now has them."""
        places, sources = [], []
        for _, method in self.packed:
            if method.part is not None and method.matrix is not None:
                begin = method.state.shape[0]
                places.append(method.matrix[begin : begin + len(method.part.a)])
                sources.append(method.part.a)
        many: Any = torch  # its stubs leave the `_foreach_*` out
        if places:
            many._foreach_copy_(places, sources)


def extra_rows(part: AdapterPart | None) -> int:
    """Below a layer's matrix: those of its A's and the padding.

    >>> extra_rows(None)
    0
    """
    return 0 if part is None else padded_rows(len(part.a))


def _beside_the_cache(numel: int, dtype: torch.dtype) -> Tensor:
    """[numel] that vLLM's allocator unmaps and maps with the cache. vLLM loads a model inside a pool of that
    allocator for what outlives a sleep; a block's tag is what decides."""
    allocator = CuMemAllocator.get_instance()
    tag, allocator.current_tag = allocator.current_tag, "kv_cache"
    try:
        return torch.empty(numel, dtype=dtype, device="cuda")
    finally:
        allocator.current_tag = tag


@dataclass(slots=True)
class Built:
    """vLLM's module: bytes that making it left allocated, and at most; the base in 16 bits, where that was asked."""

    left: int = 0
    peak: int = 0
    dequantized: Dequantized | None = None
    scores: Scores = field(default_factory=Scores)


def register(
    weights: BaseWeights | None, adapter: EngineAdapter, architecture: str, *, dequantize: bool = False
) -> Built:
    """Teach vLLM the load format and the quantization for the next engine of this process.

    `architecture`: the name of transformers' class, whose vLLM twin is imported here. The weights are reached by
    closure, because vLLM copies what stands in its configs; with None vLLM loads its own, 16-bit.
    """
    built = Built()
    _register_methods(weights.fused_states if weights else {}, adapter, built.scores)
    known = ModelRegistry.models.get(architecture)
    if known is not None:  # a class is asked right here what it can do; a name, in a process that first imports vLLM
        ModelRegistry.register_model(architecture, known.load_model_cls())
    if weights is not None:
        _register_loader(weights, built, dequantize)
    return built


def _register_methods(states: Mapping[str, Any], adapter: EngineAdapter, scores: Scores) -> None:
    @register_quantization_config(QUANTIZATION)
    class Config(QuantizationConfig):  # pyright: ignore[reportUnusedClass]
        """Which method serves which layer."""

        def get_name(self) -> str:
            return QUANTIZATION

        def get_supported_act_dtypes(self) -> list[torch.dtype]:
            return [torch.bfloat16]

        @classmethod
        def get_min_capability(cls) -> int:
            return 80  # bfloat16

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> "Config":
            return cls()

        def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
            if isinstance(layer, VocabParallelEmbedding):
                return Float32Head(scores)
            if not isinstance(layer, LinearBase):
                return None
            names = parts_of(prefix, self.packed_modules_mapping)
            state = states.get(names[0])
            part = adapter.part(names)
            return PlainMethod(part) if state is None else Nf4Method(part, state)


class NoPenalties:
    """In the place of vLLM's penalties of a sampler, which nobody asks for here: their counts, int32 [sequences,
    vocabulary], would be as large as the scores, and be copied to the host at every sleep. vLLM warms up with some."""

    output_bin_counts = None

    def add_request(self, *_: Any) -> None:
        """A request has none."""

    def apply_staged_writes(self) -> None:
        """There are none."""

    def apply_penalties(self, *_: Any) -> None:
        """The scores stay as they are."""


class PlainState(DefaultModelState):
    """vLLM's own state of a model, for a sampler without penalties."""

    def custom_sampler(self, sampler: Any) -> tuple[Any, Any] | None:
        """vLLM's name for the place where a model may change the sampler that was made for it."""
        sampler.penalties_state = NoPenalties()
        return super().custom_sampler(sampler)


def _register_loader(weights: BaseWeights, built: Built, dequantize: bool) -> None:
    @register_model_loader(LOAD_FORMAT)
    class Loader(BaseModelLoader):  # pyright: ignore[reportUnusedClass]
        """Makes vLLM's module without weights and binds it to the trainer's."""

        def download_model(self, model_config: Any) -> None:
            """Nothing to fetch."""

        def load_weights(self, model: nn.Module, model_config: Any) -> None:
            bind(model, weights)

        def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> nn.Module:
            device = torch.device("cuda", torch.cuda.current_device())
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            with set_default_torch_dtype(model_config.dtype), device, EmptyOnMeta():
                model = initialize_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
            self.load_weights(model, model_config)
            process_weights_after_loading(model, model_config, device)
            join_activations(model)
            built.left = torch.cuda.memory_allocated() - before
            built.peak = torch.cuda.max_memory_allocated() - before
            if dequantize:
                built.dequantized = Dequantized(model)
            heads = [module for module in model.modules() if isinstance(module, VocabParallelEmbedding)]
            size = vllm_config.scheduler_config.max_num_seqs, max(cast(Tensor, head.weight).shape[0] for head in heads)
            built.scores.buffer = _beside_the_cache(size[0] * size[1], torch.float32).view(size)
            if not hasattr(model, "get_model_state_cls"):
                model.get_model_state_cls = lambda: PlainState  # pyright: ignore[reportAttributeAccessIssue]
            return model.eval()


def parts_of(name: str, packed: Mapping[str, Sequence[str]]) -> list[str]:
    """The trainer's modules that an engine's module computes as one.

    >>> parts_of("model.layers.0.mlp.gate_up_proj", {"gate_up_proj": ["gate_proj", "up_proj"]})
    ['model.layers.0.mlp.gate_proj', 'model.layers.0.mlp.up_proj']
    """
    parent, _, leaf = name.rpartition(".")
    return [f"{parent}.{part}" if parent else part for part in packed.get(leaf, [leaf])]


def join_activations(model: nn.Module) -> None:
    """Have what adds the adapter to an MLP's gate and up make their gated product as well, a kernel and a pass over
    both less, and vLLM's activation pass it on.

    Only in modules that this loader made: of those families (`Family.shares`) it is known that nothing stands between
    the two. Anything but vLLM's own silu and gelu by tanh stays as it is, and so does an MLP without an adapter there.
    """
    for mlp in list(model.modules()):
        method = getattr(getattr(mlp, "gate_up_proj", None), "quant_method", None)
        activation = known_activation(getattr(mlp, "act_fn", None))
        if isinstance(method, PlainMethod | Nf4Method) and method.part is not None and activation is not None:
            method.part = replace(method.part, activation=activation)
            mlp.act_fn = nn.Identity()


def known_activation(module: Any) -> Literal["silu", "gelu_tanh"] | None:
    """As `AdapterPart` names it. By exact type: a class made of one of these may do something else."""
    if type(module) is SiluAndMul:
        return "silu"
    return "gelu_tanh" if type(module) is GeluAndMul and module.approximate == "tanh" else None


def bind(model: nn.Module, weights: BaseWeights) -> None:
    """Give every parameter of vLLM's module the trainer's memory, keeping its class and attributes.

    Modules are walked, not `model.named_parameters()`, which would pass over a tied head. Raises ValueError with the
    name of a parameter that the trainer does not have, or not as neighbours.
    """
    packed: Mapping[str, Sequence[str]] = getattr(model, "packed_modules_mapping", {})
    for owner, module in model.named_modules():
        for leaf, old in list(module.named_parameters(recurse=False)):
            names = [f"{part}.{leaf}" for part in parts_of(owner, packed)]
            new = nn.Parameter(weights.view(names, old.shape), requires_grad=False)
            if new.dtype != old.dtype:
                raise ValueError(f"{owner}.{leaf}: the engine wants {old.dtype}, the base has {new.dtype}")
            new.__class__ = old.__class__
            vars(new).update(vars(old))
            module.register_parameter(leaf, new)
    check_bound(model, weights)


def check_bound(model: nn.Module, weights: BaseWeights) -> None:
    """Raises ValueError that names what lies outside the trainer's memory: no byte of a parameter may. What a layer
    multiplies with in place of its weight begins as that weight."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta or not weights.owns(parameter):
            raise ValueError(f"the engine's {name} is not the trainer's: {parameter.nbytes} bytes outside")
    for name, module in model.named_modules():
        part = getattr(getattr(module, "quant_method", None), "part", None)
        if part is None or part.matrix is None:
            continue
        weight = cast(Tensor, module.weight)
        above = part.matrix[: part.b.shape[0]]
        if (above.data_ptr(), above.shape, above.dtype) != (weight.data_ptr(), weight.shape, weight.dtype):
            raise ValueError(f"the engine's {name} would multiply with another matrix than its weight")
    left = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if left:
        raise ValueError(f"the engine's {', '.join(left)} have no values")
