"""The frozen weights of a base model, allocated once and owned here. Everything that computes holds views of them: the
trainer's modules, and the parameters of an engine in the same process.

Projections that an engine computes as one (q, k, v; gate, up) are neighbours in one buffer, in that order, so that the
fused matrix is a view too. Nobody may move them afterwards: CUDA graphs hold their addresses. Rows below such a matrix
may be kept for an engine's adapter: they are not the base's, no name leads to them, and no checksum sees them. Left
out: reading files (base_files.py) and the modules (base_model.py).
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from reasoner.models import nf4

BELOW_ROWS = 8  # rows below a matrix are a multiple, so that a product's rows begin at multiples of 16 bytes
VOCABULARY_ROWS = 64  # vLLM pads embedding and head to a multiple of so many rows; the padding is zeros
PIECE = 1 << 20  # bytes that a checksum reads at once; it makes four numbers of 8 bytes of each
PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class BaseWeights:
    """Tensors by the names that transformers gives the model's parameters.

    `tensors` maps each name to its view; an NF4 matrix's view is its packed bytes, and `states` (by the name of its
    module) says how to read them. `fused_states` has the same of each whole group, by the name of its first module, and
    `with_rows` the matrix of a group together with the rows below it, where such are kept.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self.tensors: dict[str, Tensor] = {}
        self.states: dict[str, Any] = {}
        self.fused_states: dict[str, Any] = {}
        self.with_rows: dict[str, Tensor] = {}
        self.groups: list[tuple[str, ...]] = []  # the modules that share a buffer, in its order
        self.buffers: list[Tensor] = []
        self.nbytes_below = 0  # bytes of the rows that are an engine's adapter's
        self._sizes: dict[int, int] = {}  # where the buffers' memory begins, and how many bytes of it are the base's

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, scales and padding included, also that of the rows below."""
        return sum(buffer.untyped_storage().nbytes() for buffer in self.buffers) - self.nbytes_below

    def owns(self, tensor: Tensor) -> bool:
        """Whether the tensor, a contiguous one, lies in one of the buffers."""
        end = (tensor.storage_offset() + tensor.numel()) * tensor.element_size()
        return end <= self._sizes.get(tensor.untyped_storage().data_ptr(), -1)

    def allocate(self, name: str, shape: Sequence[int]) -> Tensor:
        """Room for one parameter that is no matrix of a group."""
        self.tensors[name] = self._own(shape, self.dtype)
        return self.tensors[name]

    def allocate_rows(self, name: str, shape: Sequence[int]) -> Tensor:
        """Room for an embedding or a head [rows, width], with zeros behind it up to a multiple of 64 rows."""
        rows, width = shape
        padded = -(-rows // VOCABULARY_ROWS) * VOCABULARY_ROWS
        buffer = self._own((padded, width), self.dtype)
        buffer[rows:].zero_()
        self.tensors[name] = buffer[:rows]
        return self.tensors[name]

    def allocate_group(
        self, modules: Sequence[str], rows: Sequence[int], width: int, *, bias: bool, packed: bool, below: int = 0
    ) -> None:
        """Room for matrices [rows[i], width] side by side, the weights of `modules`, and for their biases.

        `below`: how many rows an engine's adapter needs right below them, unless they are packed; these are zeros.
        """
        self.groups.append(tuple(modules))
        if packed:
            self._allocate_packed(modules, rows, width)
        else:
            views = self._own_above((sum(rows), width), below, modules[0]).split(list(rows))
            self.tensors |= {f"{module}.weight": view for module, view in zip(modules, views, strict=True)}
        if bias:
            views = self._own((sum(rows),), self.dtype).split(list(rows))
            self.tensors |= {f"{module}.bias": view for module, view in zip(modules, views, strict=True)}

    def _allocate_packed(self, modules: Sequence[str], rows: Sequence[int], width: int) -> None:
        data = self._own((sum(rows) * width // 2, 1), torch.uint8)
        absmax = self._own((sum(rows) * width // nf4.BLOCK,), torch.float32)
        data_views = data.split([n * width // 2 for n in rows])
        absmax_views = absmax.split([n * width // nf4.BLOCK for n in rows])
        for module, n, data_view, absmax_view in zip(modules, rows, data_views, absmax_views, strict=True):
            self.tensors[f"{module}.weight"] = data_view
            self.states[module] = nf4.make_state(absmax_view, n, width)
        self.fused_states[modules[0]] = nf4.make_state(absmax, sum(rows), width)

    def _own(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        buffer = torch.empty(tuple(shape), dtype=dtype, device=self.device)
        self._keep(buffer)
        return buffer

    def _own_above(self, shape: tuple[int, int], below: int, name: str) -> Tensor:
        rows, width = shape
        whole = torch.empty(rows + padded_rows(below), width, dtype=self.dtype, device=self.device)
        whole[rows:].zero_()
        self._keep(whole[:rows])
        if below:
            self.with_rows[name] = whole
            self.nbytes_below += below * width * whole.element_size()
        return whole[:rows]

    def _keep(self, buffer: Tensor) -> None:
        self.buffers.append(buffer)
        self._sizes[buffer.untyped_storage().data_ptr()] = buffer.nbytes

    def tie(self, name: str, to: str) -> None:
        """Give the parameter `name` the tensor of `to`."""
        self.tensors[name] = self.tensors[to]

    def fill(self, name: str, value: "Tensor | nf4.Packed") -> None:
        """Write one weight. Raises ValueError if its shape is another, or its numbers are no weights."""
        view, state = self.tensors[name], self.states.get(name.removesuffix(".weight"))
        shape = view.shape if state is None else state.shape
        if not isinstance(value, nf4.Packed) and value.dtype not in PLAIN:
            raise ValueError(f"{name}: the file has {value.dtype}, which is no plain weight")
        if value.shape != shape:
            raise ValueError(f"{name}: the file has {tuple(value.shape)}, the model {tuple(shape)}")
        if isinstance(value, nf4.Packed):
            self._fill_packed(view, state, value)
        elif state is None:
            view.copy_(value)
        else:
            nf4.quantize(value.to(self.device).to(self.dtype), view, state.absmax)

    def _fill_packed(self, view: Tensor, state: Any, value: "nf4.Packed") -> None:
        if state is not None:
            view.copy_(value.data.view_as(view))
            state.absmax.copy_(value.absmax)
        else:
            data, absmax = value.data.to(self.device), value.absmax.to(self.device)
            view.copy_(nf4.dequantize(data, nf4.make_state(absmax, *value.shape)))

    def view(self, names: Sequence[str], shape: Sequence[int]) -> Tensor:
        """One tensor over the neighbours `names`, or over one and the padding behind it; no copy.

        Raises ValueError that names what is missing, not a neighbour, or too small.
        """
        missing = [name for name in names if name not in self.tensors]
        if missing:
            raise ValueError(f"the base has no tensor {', '.join(missing)}")
        parts = [self.tensors[name] for name in names]
        for left, right in itertools.pairwise(parts):
            if left.data_ptr() + left.nbytes != right.data_ptr():
                raise ValueError(f"{', '.join(names)} are no neighbours in one buffer, so they have no fused view")
        first = parts[0]
        storage, offset = cast(Any, first.untyped_storage()), first.storage_offset()
        if (offset + math.prod(shape)) * first.element_size() > self._sizes[storage.data_ptr()]:
            raise ValueError(f"{', '.join(names)}: the buffer is too small for {tuple(shape)}")
        empty: Any = first.new_empty(0)  # the stub of set_ knows no untyped storage
        return empty.set_(storage, offset, tuple(shape))

    def group(self, modules: Sequence[str]) -> Tensor:
        """The weights of one of `groups` as one tensor, packed where they are; no copy."""
        names = [f"{module}.weight" for module in modules]
        height = sum(self.tensors[name].shape[0] for name in names)
        return self.view(names, (height, *self.tensors[names[0]].shape[1:]))

    def matrix(self, module: str) -> Tensor:
        """The weight of a module as numbers: itself, or what it dequantizes to."""
        data = self.tensors[f"{module}.weight"]
        return nf4.dequantize(data, self.states[module]) if module in self.states else data

    def checksum(self) -> int:
        """A number that changes with any bit of the base: of its bytes, weighted by their places, modulo 2^64."""
        return hash(tuple(_checksum(buffer) for buffer in self.buffers))


def padded_rows(rows: int) -> int:
    """How many rows there are below a matrix for an adapter that needs `rows`.

    >>> padded_rows(96), padded_rows(3), padded_rows(0)
    (96, 8, 0)
    """
    return -(-rows // BELOW_ROWS) * BELOW_ROWS


def _checksum(buffer: Tensor) -> int:
    total = 0
    pieces: Iterable[Tensor] = buffer.flatten().view(torch.uint8).split(PIECE)
    for number, piece in enumerate(pieces):
        places = torch.arange(1, 2 * len(piece), 2, dtype=torch.int64, device=piece.device)
        total += (2 * number + 1) * int((piece.to(torch.int64) * (places * places)).sum())
    return total % (1 << 64)
