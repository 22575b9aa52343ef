"""What an optimizer is given: an adapter's many small matrices as one vector, everything else as it is.

An optimizer that takes parameters one by one costs Python some 60 microseconds each, and bitsandbytes' also waits for
the card after each, at the end of every update. One that treats every number by itself does not mind whose it is: so
for the length of a step the matrices lie end to end in a vector, with their gradients, and are copied back after it.
The parameters stay what they are to everybody else, and between steps the vector holds nothing.

Left out: parameters of one dimension (norms, biases), large matrices, whose copies would cost memory and save nothing,
and optimizers that look at a parameter's shape or norm, which take each by itself. 8-bit states are kept by blocks of
256 numbers, so a block may span two matrices; and matrices of fewer than 4096 numbers, whose states bitsandbytes would
keep in 32 bits where they are alone, have 8-bit states like the rest.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

LARGEST = 1 << 21  # numbers in a matrix that is joined; an adapter of rank 64 on 18,944 features has 1.2 million
# Optimizers of which the update of a number depends on its own gradients alone.
BY_NUMBER = (
    "torch.optim.Adam",
    "torch.optim.AdamW",
    "bitsandbytes.optim.Adam8bit",
    "bitsandbytes.optim.AdamW",
    "bitsandbytes.optim.AdamW8bit",
)


class Stepped:
    """`parameters` are for the optimizer; `gather` comes before its step, `spread` after it."""

    def __init__(self, weights: Sequence[Parameter], optimizer: Mapping[str, Any]):
        """`optimizer`: its node in the config, whose `_target_` says whether matrices may be joined."""
        self.weights = list(weights)
        by_kind: dict[Any, list[Parameter]] = {}
        for weight in self.weights if optimizer.get("_target_") in BY_NUMBER else ():
            if weight.dim() > 1 and weight.numel() <= LARGEST:
                by_kind.setdefault((weight.dtype, weight.device), []).append(weight)
        self.joined = [(Parameter(of[0].new_empty(0)), of) for of in by_kind.values() if len(of) > 1]
        inside = {id(member) for _, members in self.joined for member in members}
        self.parameters = [vector for vector, _ in self.joined]
        self.parameters += [weight for weight in self.weights if id(weight) not in inside]

    def gather(self, *, everything: bool) -> list[Tensor]:
        """Have `parameters` hold the weights and the gradients; the gradients there are. A member of a vector without
        one has zeros; with `everything` so has a parameter or a vector where nothing has one."""
        for vector, members in self.joined:
            if everything or any(member.grad is not None for member in members):
                gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in members]
                joined = torch.cat([gradient.reshape(-1) for gradient in gradients])
                del gradients
                for member in members:  # freed before the weights are copied too
                    member.grad = None
                vector.data = torch.cat([member.detach().reshape(-1) for member in members])
                vector.grad = joined
        for parameter in self.parameters:
            if everything and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def norm(self) -> Tensor:
        """Of all gradients together, matrix by matrix: one float32 sum over a long vector loses its small squares on a
        CPU, 3e-5 of the norm at two million numbers."""
        parts = {id(weight): weight.grad for weight in self.weights}
        for vector, members in self.joined:
            if vector.grad is not None:
                pieces = vector.grad.split([member.numel() for member in members])
                parts.update(zip(map(id, members), pieces, strict=True))
        return torch.nn.utils.get_total_norm([part for part in parts.values() if part is not None])

    def spread(self) -> None:
        """Give the members what the optimizer made of the vectors, where they hold something."""
        for vector, members in self.joined:
            if vector.grad is not None:
                parts = vector.detach().split([member.numel() for member in members])
                places: list[Tensor] = list(members)
                with torch.no_grad():  # a copy for each would be a launch for each
                    torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]
                        places, [part.view_as(of) for part, of in zip(parts, members, strict=True)]
                    )

    def drop(self) -> None:
        """Let go of every gradient, and of what the vectors hold."""
        for weight in (*self.weights, *self.parameters):
            weight.grad = None
        for vector, _ in self.joined:
            vector.data = vector.new_empty(0)
