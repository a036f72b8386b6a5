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
            return linear_bf16(x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)
        return F.linear(x, self.weight)


def goes_the_short_way(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether x (..., inputs) has few rows, and the compiled code may take them."""
    return x.numel() <= FEW_ROWS * x.shape[-1] and suits_compiled_code(x, weight)


def suits_compiled_code(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the compiled code may take x with `weight`: bf16 on a CPU, nothing recorded, traced or cast."""
    plain = x.numel() > 0 and x.device.type == weight.device.type == "cpu"
    plain = plain and x.dtype == weight.dtype == torch.bfloat16
    if not plain or torch.compiler.is_compiling() or not weight.is_contiguous():
        return False
    recorded = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return not recorded and not torch.is_autocast_enabled("cpu") and why_unavailable() is None
