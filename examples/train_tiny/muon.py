"""Muon, the optimizer the K2 line was trained with, for matrices; AdamW for everything else.

Momentum is made orthogonal before it is applied, so that every direction of a matrix learns at the same rate (Jordan et
al. 2024), and scaled by 0.2 sqrt(max(rows, columns)), which gives updates the size that AdamW's have: one learning rate
and one weight decay serve both (Liu et al., arXiv:2502.16982). The clipping of attention logits that makes it MuonClip
is not needed at this size.
"""

from collections.abc import Iterable

import torch
from torch import nn

from .precision import product_dtype


def orthogonalize(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The nearest matrix (..., N, M) with singular values near one, by a quintic Newton-Schulz iteration, for which
    bfloat16 is exact enough."""
    a, b, c = 3.4445, -4.7750, 2.0315  # chosen for speed: singular values end between 0.7 and 1.2
    x = (matrix / (matrix.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(product_dtype())
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.mT).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """For parameters of two dimensions, or stacks of them. lr and weight_decay as for AdamW."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0, momentum: float = 0.95
    ):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(
                        parameter, parameter.grad, group["lr"], group["weight_decay"], group["momentum"]
                    )

    def update(
        self, parameter: torch.Tensor, grad: torch.Tensor, lr: float, weight_decay: float, momentum: float
    ) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer = state["momentum_buffer"].lerp_(grad, 1 - momentum)
        direction = grad.lerp(buffer, momentum)  # Nesterov's
        size = 0.2 * max(parameter.shape[-2:]) ** 0.5
        parameter.mul_(1 - lr * weight_decay).add_(orthogonalize(direction), alpha=-lr * size)


def optimizers(model: nn.Module, lr: float, weight_decay: float = 0.05) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, heads, routers, norms and biases.

    What enters the vision tower learns at a tenth of the rate: at the full one it outgrows the fixed embedding of the
    frames' times (norm 120 against 8) and the order of a chunk's frames is lost.
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    patches: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            outside = ("embed_tokens", "lm_head", "mlp.gate.")
            is_matrix = parameter.ndim in (2, 3) and not any(part in name for part in outside)
            (patches if "patch_embed" in name else matrices if is_matrix else others).append(parameter)
    groups = [{"params": others, "share": 1.0}, {"params": patches, "share": 0.1}]
    adamw = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    return [Muon(matrices, lr=lr, weight_decay=weight_decay), adamw]
