"""A linear layer that knows the short way for few rows on a CPU.

PyTorch's product of one bf16 row with a matrix reaches about a third of the memory's rate; the compiled code of
`kimi_cpu.py` reaches the memory's. Everything else (more rows, other devices, other dtypes, gradients, tracing) is
`nn.Linear`, which this is for every tool that looks for one.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .kimi_cpu import linear_bf16, why_unavailable

FEW_ROWS = 4  # see LOG.md: from 8 rows on, PyTorch's product wins


class Linear(nn.Linear):
    """y = x W^T, without a bias. x (..., inputs), W (outputs, inputs)."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if goes_the_short_way(x, self.weight):
            return linear_bf16(x, self.weight)
        return F.linear(x, self.weight)


def goes_the_short_way(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether x (..., inputs) has few rows, and the compiled code may take them."""
    return x.numel() <= FEW_ROWS * x.shape[-1] and weight.is_contiguous() and suits_compiled_code(x, weight)


def suits_compiled_code(*tensors: torch.Tensor) -> bool:
    """Whether the compiled code may take them: bf16 on a CPU, none empty, nothing recorded, traced or cast."""
    for tensor in tensors:
        if tensor.dtype != torch.bfloat16 or tensor.device.type != "cpu" or not tensor.numel():
            return False
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or why_unavailable() is not None:
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
