"""The routed experts of a layer: stacked tensors, the names they are published under, and the plain product.

Letters: R rows (all tokens of a batch), H hidden size, I inner size, E experts, K experts per token; a matrix has N
outputs and M inputs.

A layer's experts are stacked by projection: one (E, N, M/8) int32 tensor where the checkpoint has E matrices named
`experts.{e}.gate_proj.weight_packed`. Stacking makes a model of 61 layers in milliseconds and hands a kernel one
pointer; state_dict() and load_state_dict() use the checkpoint's names.

    Experts          the module: parameters, names, loading and saving
    run_experts      sum_k weights_k * down(silu(gate(x)) * up(x)) of expert k, in plain torch: the truth
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_kimi import KimiK25TextConfig
from .kimi_backends import faster_experts
from .kimi_files import zeros_for_weights
from .kimi_int4 import CODES_PER_WORD, GROUP_SIZE, ExpertMatrices


class Experts(nn.Module):
    """The routed experts of one layer, stacked.

    For each projection p of gate_proj (I, H), up_proj (I, H), down_proj (H, I), as (N, M):
    `{p}_weight_packed` (E, N, M/8) int32, `{p}_weight_scale` (E, N, M/32), `{p}_weight_shape` (E, 2) int32; or, without
    quantization, `{p}_weight` (E, N, M). Packed ones start as zeros and are never touched by weight initialisation;
    they keep their dtypes through `.to(dtype)`, so that what is saved is what was read.

    state_dict() gives the checkpoint's names, `{e}.{p}.weight_packed`. Hooks that move weights (accelerate's) ask by
    parameter name instead; `stacked_names` is set while they are being attached.
    """

    stacked_names = False

    def __init__(self, config: KimiK25TextConfig):
        super().__init__()
        self.config = config
        self.num_experts = config.n_routed_experts
        self.packed = config.expert_quantization is not None
        width, inner = config.hidden_size, config.moe_intermediate_size
        self.shapes = {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}
        self.published: dict[str, tuple[str, str]] = {}  # parameter -> (projection, tensor)
        for projection, (outputs, inputs) in self.shapes.items():
            rows = (self.num_experts, outputs)
            if not self.packed:
                self._register(projection, "weight", torch.empty(*rows, inputs), trainable=True)
                continue
            words = zeros_for_weights((*rows, inputs // CODES_PER_WORD), torch.int32)
            scales = zeros_for_weights((*rows, inputs // GROUP_SIZE), torch.bfloat16)
            shape = torch.tensor([outputs, inputs], dtype=torch.int32)
            self._register(projection, "weight_packed", words)
            self._register(projection, "weight_scale", scales)
            self._register(projection, "weight_shape", shape.repeat(self.num_experts, 1))

    def _register(self, projection: str, tensor: str, data: torch.Tensor, trainable: bool = False) -> None:
        self.register_parameter(f"{projection}_{tensor}", nn.Parameter(data, requires_grad=trainable))
        self.published[f"{projection}_{tensor}"] = projection, tensor

    def matrices(self, projection: str) -> ExpertMatrices:
        if not self.packed:
            return ExpertMatrices(getattr(self, f"{projection}_weight"), None)
        return ExpertMatrices(
            getattr(self, f"{projection}_weight_packed"), getattr(self, f"{projection}_weight_scale")
        )

    def forward(self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """x (R, H), ids (R, K), weights (R, K) fp32 to the weighted sum of the chosen experts, (R, H) fp32."""
        matrices = [self.matrices(projection) for projection in self.shapes]
        run = faster_experts(self.config.int4_backend, x, topk_weights, matrices, run_experts) or run_experts
        return run(x, topk_ids, topk_weights, *matrices)

    def prefetch(self, topk_ids: torch.Tensor) -> None:
        """Called as soon as the choices (R, K) are known: nothing to do for experts in memory."""

    def stack(self, parameter: str) -> torch.Tensor:
        """A stacked parameter, or one on meta that stands for it."""
        return self.get_parameter(parameter)

    def num_weights(self) -> int:
        """Logical weights: one for each int4 code, none for scales and shapes."""
        return self.num_experts * sum(outputs * inputs for outputs, inputs in self.shapes.values())

    def extra_repr(self) -> str:
        sizes = ", ".join(f"{name} {n}x{m}" for name, (n, m) in self.shapes.items())
        return f"{self.num_experts} experts, {'int4' if self.packed else 'dense'}: {sizes}"

    def published_names(self, prefix: str) -> Iterator[tuple[str, list[str]]]:
        """(parameter, the E names of its slices) where this module is at `prefix`, e.g. `model.layers.1.mlp.experts.`"""
        for parameter, (projection, tensor) in self.published.items():
            yield parameter, [f"{prefix}{expert}.{projection}.{tensor}" for expert in range(self.num_experts)]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.stacked_names:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        for name, names in self.published_names(prefix):
            parameter = self.get_parameter(name)
            destination.update(
                zip(names, (parameter if keep_vars else parameter.detach()).unbind(), strict=True)
            )

    @torch.no_grad()
    def _load_from_state_dict(
        self,
        state_dict: dict,
        prefix: str,
        metadata: dict,
        strict: bool,
        missing: list,
        unexpected: list,
        errors: list,
    ) -> None:
        known: set[str] = set()
        for parameter, names in self.published_names(prefix):
            known.update(names)
            missing.extend(name for name in names if name not in state_dict)
            stack = self.get_parameter(parameter)
            for place, name in zip(stack.unbind(), names, strict=True):
                given = state_dict.get(name, place)
                if given.shape != place.shape:
                    errors.append(f"{name} has shape {tuple(given.shape)}, expected {tuple(place.shape)}")
                else:
                    place.copy_(given)
        if strict:
            unexpected.extend(name for name in state_dict if name.startswith(prefix) and name not in known)

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        return apply_keeping_dtype(
            self, fn, [name for name in self._parameters if name.endswith("weight_scale")]
        )


def run_experts(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    gate: ExpertMatrices,
    up: ExpertMatrices,
    down: ExpertMatrices,
) -> torch.Tensor:
    """x (R, H), ids and fp32 weights (R, K) to the weighted sum of the chosen experts, (R, H) fp32.

    Sorts the R * K (row, choice) pairs by expert, runs each expert that was chosen on its rows, and adds the weighted
    outputs in fp32, (R, H). Unpacks only the experts the batch was routed to, one at a time.
    """
    order = topk_ids.flatten().argsort(stable=True)  # pairs, by expert
    counts = topk_ids.flatten().bincount(minlength=gate.num_experts).tolist()  # the one host sync of a layer
    rows = order // topk_ids.shape[-1]  # (R * K,) which row a pair belongs to
    weights = topk_weights.flatten()[order].unsqueeze(-1)  # (R * K, 1) fp32
    output = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    start = 0
    for expert, count in enumerate(counts):
        if count:
            chosen = slice(start, start + count)
            x_e = x[rows[chosen]]
            y_e = down.linear(F.silu(gate.linear(x_e, expert)) * up.linear(x_e, expert), expert)
            output.index_add_(0, rows[chosen], y_e.float() * weights[chosen])
        start += count
    return output


def apply_keeping_dtype(module: nn.Module, fn: Callable, names: Iterable[str]) -> nn.Module:
    """nn.Module._apply that moves but does not cast the named parameters: .to(dtype), .half(), .float() pass them by."""
    kept = {name: module.get_parameter(name).data for name in names}
    nn.Module._apply(module, fn)
    for name, old in kept.items():
        moved = module.get_parameter(name)
        if moved.dtype != old.dtype:
            moved.data = old.to(moved.device)
    return module
