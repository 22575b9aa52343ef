"""RMSNorm as PyTorch's one kernel, in place of the six small operations of transformers' modules: arXiv:1910.07467.

On a GPU those cost a small model more time than its matrices. Done for modules that multiply by their weight as it is;
Gemma's, which multiply by 1 + weight in float32, stay transformers' own.
"""

from typing import Any

import torch
from torch import Tensor, nn

# Of which families the norms are plain, as their modelling code in transformers 5.17 and 5.24 says.
PLAIN_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3")


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32, rounded once to the dtype of x."""

    def __init__(self, weight: nn.Parameter, eps: float):
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: Tensor) -> Tensor:
        """[.., D] -> [.., D]."""
        return torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


def replace_norms(model: nn.Module, family: str) -> int:
    """Put ours in place of the model's norms, on the same weights under the same names; how many there were."""
    if family not in PLAIN_FAMILIES:
        return 0
    norms = [(name, part) for name, part in model.named_modules() if type(part).__name__.endswith("RMSNorm")]
    for name, part in norms:
        parent, _, leaf = name.rpartition(".")
        norm: Any = part
        setattr(model.get_submodule(parent), leaf, RMSNorm(norm.weight, norm.variance_epsilon))
    return len(norms)
