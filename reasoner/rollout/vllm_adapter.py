"""The policy's adapter as the engine's linear layers read it: 16-bit copies in buffers that never move.

x A^T B^T is added inside the layer's own product, so vLLM's LoRA slots, request names and private manager are not
needed, any rank will do, and no atomic sums make two runs differ. A's of a fused projection are one buffer and one
matmul, none where they lie below the base's matrix; its B's are one launch, which makes the gated product of an MLP's
gate and up too. Left out: several adapters at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, silu

from reasoner.errors import ModelError
from reasoner.models.adapters import place_of
from reasoner.models.base_model import siblings


@dataclass(frozen=True, slots=True, eq=False)
class AdapterPart:
    """What one engine layer adds: S adapted parts of rank r, K inputs, O outputs."""

    a: Tensor  # [S r, K]
    b: Tensor  # [O, r], one part's rows below another's; of outputs without an adapter, zeros
    bounds: tuple[tuple[int, int], ...]  # the outputs that each of the S begins and ends with
    scaling: float
    # [O + S r or more, K]: the trainer's matrix of this layer and below it, as some of its rows, `a`. None: apart.
    matrix: Tensor | None = None
    # Set: the outputs are a gate and an up projection's, and the layer gives act(gate) * up, [.., O / 2].
    activation: Literal["silu", "gelu_tanh"] | None = None

    def add_to(self, out: Tensor, x: Tensor) -> Tensor:
        """The layer's output from `out` [.., O], the base's and its bias, which may be written over; x [.., K]."""
        flat = out.view(-1, out.shape[-1])
        joined = self._join(flat, linear(x, self.a).flatten(0, -2), None, over=True)
        return joined.view(*out.shape[:-1], joined.shape[-1])

    def joined(self, both: Tensor, bias: Tensor | None) -> Tensor:
        """The same, [N, O] or with an activation [N, O / 2], from x [W; A]^T: `both` [N, O + S r or more], whose last
        columns are x A^T. No tensor of the caller's changes."""
        outputs = self.b.shape[0]
        return self._join(both[:, :outputs], both[:, outputs:], bias, over=False)

    def _join(self, base: Tensor, low: Tensor, bias: Tensor | None, *, over: bool) -> Tensor:
        """base + bias + scaling * low B^T, gated where that is asked; low [N, S r or more]. `over`: may be in base."""
        given = self.b, self.bounds, bias, self.scaling
        width = base.shape[1] // (1 if self.activation is None else 2)
        out = base if over and self.activation is None else base.new_empty(len(base), width)
        if not out.is_cuda:
            self._join_torch(out, base, low, bias)
        elif self.activation is None:
            from reasoner.rollout.vllm_adapter_triton import join

            join(out, base, low, *given)
        else:
            from reasoner.rollout.vllm_adapter_triton import join_gated

            join_gated(out, base, low, *given, tanh=self.activation == "gelu_tanh")
        return out

    def _join_torch(self, out: Tensor, base: Tensor, low: Tensor, bias: Tensor | None) -> None:
        total = base.clone() if bias is None else base + bias
        rank = self.b.shape[1]
        for i, (begin, end) in enumerate(self.bounds):
            ranks = low[:, i * rank : (i + 1) * rank]
            total[:, begin:end].addmm_(ranks, self.b[begin:end].t(), alpha=self.scaling)
        if self.activation is not None:
            gate, up = total.float().chunk(2, -1)
            total = (silu(gate) if self.activation == "silu" else gelu(gate, approximate="tanh")) * up
        out.copy_(total)


class EngineAdapter:
    """Every layer's `AdapterPart`, refilled at once."""

    def __init__(
        self,
        state: Mapping[str, Tensor],
        rows: Mapping[str, int],
        scaling: float,
        dtype: torch.dtype,
        with_rows: Mapping[str, Tensor],
    ):
        """`state`: the trained matrices by name, as they are now; `rows`: how many outputs each module of the base has
        (unadapted siblings shift those after them); `with_rows`: that of `BaseWeights`, where the A's go."""
        self.scaling = scaling
        self._parts: dict[str, AdapterPart] = {}
        self._groups: dict[str, list[str]] = {}  # which modules a part is of
        self._taken: set[str] = set()
        self._targets: dict[str, Tensor] = {}  # by the trained matrix's name
        names = {place_of(name): name for name in state}
        modules = dict.fromkeys(module for module, _ in names)
        for module in modules:
            group = [sibling for sibling in siblings(module) if sibling in rows]
            if group[0] not in self._parts:
                adapted = [sibling for sibling in group if sibling in modules]
                matrix = with_rows.get(group[0])
                self._parts[group[0]] = self._make_part(group, adapted, state, names, rows, dtype, matrix)
                self._groups[group[0]] = group
        self.load(state)

    def _make_part(
        self,
        group: Sequence[str],
        adapted: Sequence[str],
        state: Mapping[str, Tensor],
        names: Mapping[tuple[str, str], str],
        rows: Mapping[str, int],
        dtype: torch.dtype,
        matrix: Tensor | None,
    ) -> AdapterPart:
        first = state[names[adapted[0], "A"]]
        rank, outputs = first.shape[0], sum(rows[module] for module in group)
        shape = (len(adapted) * rank, first.shape[1])
        a = first.new_zeros(shape, dtype=dtype) if matrix is None else matrix[outputs : outputs + shape[0]]
        assert a.shape == shape and a.dtype == dtype, (group, a.shape, a.dtype)
        b = first.new_zeros((outputs, rank), dtype=dtype)
        bounds = []
        for i, module in enumerate(adapted):
            begin = sum(rows[before] for before in group[: group.index(module)])
            bounds.append((begin, begin + rows[module]))
            self._targets[names[module, "A"]] = a[i * rank : (i + 1) * rank]
            self._targets[names[module, "B"]] = b[slice(*bounds[-1])]
        return AdapterPart(a, b, tuple(bounds), self.scaling, matrix)

    @property
    def nbytes(self) -> int:
        """Bytes of the copies."""
        return sum(target.nbytes for target in self._targets.values())

    def part(self, modules: Sequence[str]) -> AdapterPart | None:
        """What the engine's layer over these modules of the base adds; None where none of them is adapted.

        Raises ModelError if the engine computes apart what lies together here.
        """
        owner = next((first for first, group in self._groups.items() if modules[0] in group), None)
        if owner is None:
            return None
        if list(modules) != self._groups[owner]:
            raise ModelError(
                f"vLLM computes {', '.join(modules)} apart from its siblings, so the adapter can't be handed over: set "
                "rollout=hf"
            )
        self._taken.add(owner)
        return self._parts[owner]

    def check_taken(self) -> None:
        """Raises ModelError if a part was asked for by no layer of the engine: it would sample without it."""
        left = sorted(self._parts.keys() - self._taken)
        if left:
            raise ModelError(
                f"vLLM's model has no layer for {len(left)} parts of the adapter, first {left[0]}: it names its layers "
                "otherwise. Set rollout=hf"
            )

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy the trained matrices, rounded; they themselves stay as they are.

        A few kernels for all of them (`_foreach_copy_`), where a copy each would be four hundred.
        """
        assert state.keys() == self._targets.keys(), set(state) ^ set(self._targets)
        many: Any = torch  # its stubs leave the `_foreach_*` out
        many._foreach_copy_(list(self._targets.values()), [state[name] for name in self._targets])
