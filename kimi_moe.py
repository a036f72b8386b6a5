"""Feed-forward layers: dense MLP, router, routed experts and shared expert.

Letters: R rows (all tokens of a batch), H hidden size, I inner size, E experts, K experts per token.

    x (R, H)
      Router    s = sigmoid(x W^T) in fp32, (R, E)
                choose the K best of s + e_score_correction_bias, within the best groups
                weights = s at the chosen, divided by their sum, times routed_scaling_factor
      Experts   sum_k weights_k * down(silu(gate(x)) * up(x)) of expert k, summed in fp32
      + shared_experts(x)

The correction bias only selects: it was trained to balance load without an auxiliary loss (DeepSeek-V3,
arXiv:2412.19437 section 2.1.2) and never scales an output.

A layer's experts are stacked by projection: one (E, N, M/8) int32 tensor where the checkpoint has E matrices named
`experts.{e}.gate_proj.weight_packed`. Stacking makes a model of 61 layers in milliseconds and hands a kernel one
pointer; state_dict() and load_state_dict() speak the checkpoint's names.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import logging

from .configuration_kimi import KimiK25TextConfig
from .kimi_cpu import (
    expert_int4,
    experts_int4,
    has_expert_product,
    linear_bf16,
    unpack_int4_bf16,
    why_unavailable,
)
from .kimi_files import zeros_for_weights
from .kimi_int4 import CODES_PER_WORD, GROUP_SIZE, dequantize_int4, int4_linear
from .kimi_linear import Linear, goes_the_short_way

NO_TRITON: str | None = None
try:
    from .kimi_int4_triton import run_experts_triton
except ImportError as error:
    NO_TRITON = f"triton cannot be imported ({error})"

logger = logging.get_logger(__name__)
ROWS_AT_ONCE = 4096  # of a long prompt: inner values are wider than the stream, or fp32


def by_rows(function: Callable, x: torch.Tensor, rows: int) -> torch.Tensor:
    """function(x), of `rows` rows of x (..., H) at a time where nothing is recorded; it must map rows one by one."""
    if x.numel() <= rows * x.shape[-1] or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(x)
    output = x.new_empty(x.shape)
    for part, to in zip(x.flatten(0, -2).split(rows), output.flatten(0, -2).split(rows), strict=True):
        to.copy_(function(part))
    return output


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), no biases. The dense first layer and the shared expert."""

    def __init__(self, hidden_size: int, inner_size: int):
        super().__init__()
        self.gate_proj = Linear(hidden_size, inner_size)
        self.up_proj = Linear(hidden_size, inner_size)
        self.down_proj = Linear(inner_size, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., H) to (..., H)."""
        return by_rows(self.swiglu, x, ROWS_AT_ONCE)

    def swiglu(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def route(
    scores: torch.Tensor, bias: torch.Tensor, top_k: int, n_group: int, topk_group: int
) -> torch.Tensor:
    """Chooses `top_k` experts by scores + bias, both fp32, from the `topk_group` best groups: (R, E) to (R, K) ids.

    A group's score is the sum of its two best. Closed groups get -inf, not 0: with negative biases an open
    expert may lie below 0.
    """
    choice = scores + bias
    if topk_group < n_group:
        grouped = choice.unflatten(-1, (n_group, -1))  # (R, G, E/G)
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(topk_group, dim=-1).indices  # (R, topk_group)
        closed = torch.ones(grouped.shape[:2], dtype=torch.bool, device=choice.device).scatter(1, best, False)
        choice = grouped.masked_fill(closed.unsqueeze(-1), float("-inf")).flatten(-2)
    return choice.topk(top_k, dim=-1, sorted=False).indices


class Router(nn.Module):
    """Chooses experts and their weights for each row. Not an nn.Linear: quantizers would pack it by its class."""

    def __init__(self, config: KimiK25TextConfig):
        super().__init__()
        self.top_k, self.n_group, self.topk_group = (
            config.num_experts_per_tok,
            config.n_group,
            config.topk_group,
        )
        self.norm_topk_prob, self.scaling = config.norm_topk_prob, config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.e_score_correction_bias = nn.Parameter(
            torch.zeros(config.n_routed_experts, dtype=torch.float32), requires_grad=False
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(R, H) to topk_ids (R, K) int64 and topk_weights (R, K) fp32."""
        with torch.autocast(x.device.type, enabled=False):
            # fp32: scores in bf16 tie, and ties swap experts.
            if goes_the_short_way(x, self.weight):
                scores = linear_bf16(x, self.weight, torch.float32).sigmoid()  # (R, E)
            else:
                scores = F.linear(x.float(), self.weight.float()).sigmoid()
        with torch.no_grad():
            topk_ids = route(scores, self.e_score_correction_bias, self.top_k, self.n_group, self.topk_group)
        topk_weights = scores.gather(-1, topk_ids)
        if self.norm_topk_prob:
            topk_weights = topk_weights / (topk_weights.sum(-1, keepdim=True) + 1e-20)
        return topk_ids, topk_weights * self.scaling

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        return _apply_keeping_dtype(self, fn, ("e_score_correction_bias",))


class ExpertMatrices(NamedTuple):
    """One projection (N outputs, M inputs) of all E experts of a layer: int4, or dense if `scale` is None."""

    weight: torch.Tensor  # (E, N, M/8) int32 words, or (E, N, M)
    scale: torch.Tensor | None  # (E, N, M/32)

    @property
    def num_experts(self) -> int:
        return len(self.weight)

    def place(self, expert: int) -> int:
        """Where in the stack one expert is."""
        return expert

    def one(self, expert: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One expert's matrix and scales."""
        place = self.place(expert)
        return self.weight[place], None if self.scale is None else self.scale[place]

    def batches(self, experts: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Cuts a list of experts, (P,) ids, into parts that are in memory together, with their places in the stack."""
        yield slice(None), experts

    def linear(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        """x (R, M) through one expert's matrix, (R, N)."""
        weight, scale = self.one(expert)
        return F.linear(x, weight) if scale is None else int4_linear(x, weight, scale)

    def gathered(self, experts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The matrices of `experts`, (P,) ids on the device, as (P, N, M) in `dtype`."""
        if self.scale is None:
            return self.weight[experts].to(dtype)
        return dequantize_int4(self.weight[experts], self.scale[experts], dtype)


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
        return choose_backend(self.config.int4_backend, x, matrices[0])(x, topk_ids, topk_weights, *matrices)

    def prefetch(self, topk_ids: torch.Tensor) -> None:
        """Called as soon as the choices (R, K) are known: nothing to do for experts in memory."""

    def stack(self, parameter: str) -> torch.Tensor:
        """A stacked parameter, or one on meta that stands for it."""
        return self._parameters[parameter]

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
            parameter = self._parameters[name]
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
            stack = self._parameters[parameter]
            for place, name in zip(stack.unbind(), names, strict=True):
                given = state_dict.get(name, place)
                if given.shape != place.shape:
                    errors.append(f"{name} has shape {tuple(given.shape)}, expected {tuple(place.shape)}")
                else:
                    place.copy_(given)
        if strict:
            unexpected.extend(name for name in state_dict if name.startswith(prefix) and name not in known)

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        return _apply_keeping_dtype(
            self, fn, [name for name in self._parameters if name.endswith("weight_scale")]
        )


def choose_backend(requested: str, x: torch.Tensor, gate: ExpertMatrices) -> Callable:
    """The function that runs a layer's experts, from what config.int4_backend asks for, the device, the dtype and what
    is being done. Raises ValueError if a backend was asked for by name and cannot be used, with the reason."""
    if torch.compiler.is_compiling():
        return run_experts_gathered
    if requested == "reference" or gate.scale is None:
        return run_experts
    device, why_not = x.device.type, None
    if requested == "cpu" or (requested == "auto" and device == "cpu"):
        why_not = why_not_cpu(x, gate)
        if why_not is None:
            return run_experts_cpu
    if requested == "triton" or (requested == "auto" and device == "cuda"):
        recorded = torch.is_grad_enabled() and x.requires_grad
        why_not = "it computes no gradients" if recorded else why_not_triton(x.device)
        if why_not is None:
            return run_experts_triton
    if requested != "auto":
        raise ValueError(f"int4_backend '{requested}' is unavailable: {why_not}.")
    return run_experts


def why_not_cpu(x: torch.Tensor, gate: ExpertMatrices) -> str | None:
    if x.device.type != "cpu":
        return f"the weights are on {x.device}"
    if x.dtype != torch.bfloat16 or gate.scale.dtype != torch.bfloat16:
        return f"it takes bfloat16, not {x.dtype} with {gate.scale.dtype} scales"
    if torch.is_grad_enabled() and x.requires_grad:
        return "it computes no gradients"
    return why_unavailable()


@functools.cache
def why_not_triton(device: torch.device) -> str | None:
    """None if the kernels run on this device and agree with the reference, which is tried once on a small layer."""
    if NO_TRITON is not None or device.type != "cuda":
        return NO_TRITON or f"the weights are on {device}"
    generator = torch.Generator().manual_seed(0)
    matrices = []
    for outputs, inputs in ((64, 256), (64, 256), (256, 64)):
        words = torch.randint(
            -(2**31), 2**31, (4, outputs, inputs // CODES_PER_WORD), generator=generator
        ).int()
        scales = (torch.rand(4, outputs, inputs // GROUP_SIZE, generator=generator) * 0.02).bfloat16()
        matrices.append(ExpertMatrices(words.to(device), scales.to(device)))
    try:
        for rows in (1, 40):  # the kernels for few and for many rows
            x = torch.randn(rows, 256, generator=generator).bfloat16().to(device)
            ids = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(rows)]).to(device)
            weights = torch.ones(rows, 2, device=device)
            want = run_experts(x, ids, weights, *matrices)
            wrong = (run_experts_triton(x, ids, weights, *matrices) - want).abs().max() / want.abs().max()
            if not wrong < 0.05:
                raise ArithmeticError(f"{rows} rows differ by {float(wrong):.3g} of the largest output")
    except Exception as problem:  # whatever a compiler or driver may raise: the reference still works
        reason = f"its kernels fail on {device} ({type(problem).__name__}: {problem})"
        logger.warning(f"int4 experts run in plain torch, slowly: triton is there, but {reason}")
        return reason
    return None


def run_experts(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    gate: ExpertMatrices,
    up: ExpertMatrices,
    down: ExpertMatrices,
) -> torch.Tensor:
    """The seam where faster backends plug in; this is the plain reference.

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


# Rows of one expert up to which reading its words for each of them is faster than unpacking them once; see LOG.md.
FEW_ROWS = 16
FEW_ROWS_BESIDE_TILES = 3  # ... where unpacking goes straight into the tiles of AMX


@torch.no_grad()
def run_experts_cpu(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    gate: ExpertMatrices,
    up: ExpertMatrices,
    down: ExpertMatrices,
) -> torch.Tensor:
    """The same for bf16 on a CPU, with compiled code. Experts with few rows multiply the words as they are; one with many
    rows is unpacked into tiles of AMX, or into a buffer that all of them share, for the dense product."""
    packed = [(matrix.weight, matrix.scale) for matrix in (gate, up, down)]
    x, choices = x.contiguous(), topk_ids.shape[-1]
    if len(x) <= FEW_ROWS:
        return experts_int4(x, topk_ids.contiguous(), topk_weights.contiguous(), packed)
    order = topk_ids.flatten().argsort(stable=True)  # pairs, by expert
    experts, rows = topk_ids.flatten()[order], order // choices
    weights = topk_weights.flatten()[order].unsqueeze(-1)
    counts = experts.bincount(minlength=gate.num_experts)
    output = torch.zeros(x.shape, dtype=torch.float32)
    with_tiles = has_expert_product()
    limit = FEW_ROWS_BESIDE_TILES if with_tiles else FEW_ROWS
    few = (counts <= limit)[experts]
    if few.any():
        few_rows, few_weights = rows[few], weights[few]
        for part, places in gate.batches(experts[few]):
            y = experts_int4(x[few_rows[part]], places.unsqueeze(-1), few_weights[part], packed)
            output.index_add_(0, few_rows[part], y)
    inner, width = gate.weight.shape[1], x.shape[1]
    shapes = () if with_tiles else ((inner, width), (inner, width), (width, inner))
    buffers = [x.new_empty(shape) for shape in shapes]
    run_by_tiles = expert_int4(x, rows, weights, packed, output) if with_tiles else None
    start = 0
    for expert, count in enumerate(counts.tolist()):
        if count > limit and run_by_tiles is not None:
            run_by_tiles(gate.place(expert), start, count)
        elif count > limit:
            chosen = slice(start, start + count)
            w_gate, w_up, w_down = (
                unpack_int4_bf16(*matrix.one(expert), buffer)
                for matrix, buffer in zip((gate, up, down), buffers, strict=True)
            )
            x_e = x[rows[chosen]]
            y_e = F.linear(F.silu(F.linear(x_e, w_gate)).mul_(F.linear(x_e, w_up)), w_down)
            output.index_add_(0, rows[chosen], y_e.float().mul_(weights[chosen]))
        start += count
    return output


def run_experts_gathered(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    gate: ExpertMatrices,
    up: ExpertMatrices,
    down: ExpertMatrices,
) -> torch.Tensor:
    """The same without looking at the routing, so that it can be compiled or captured whole: a copy of every chosen
    expert for every row, which a handful of rows can afford.
    """
    rows, choices = topk_ids.shape
    x = x.repeat_interleave(choices, dim=0).unsqueeze(-1)  # (R K, H, 1)
    ids = topk_ids.flatten()
    hidden = F.silu(gate.gathered(ids, x.dtype) @ x) * (up.gathered(ids, x.dtype) @ x)  # (R K, I, 1)
    output = (down.gathered(ids, x.dtype) @ hidden).float().view(rows, choices, -1)  # (R, K, H)
    return (output * topk_weights.unsqueeze(-1)).sum(dim=1)


class MoE(nn.Module):
    """Router, routed experts and the shared expert, which every token passes with weight one."""

    def __init__(self, config: KimiK25TextConfig):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = MLP(config.hidden_size, config.n_shared_experts * config.moe_intermediate_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, H) to (B, T, H)."""
        return by_rows(self.mix, x, 2 * ROWS_AT_ONCE)  # more, since each part unpacks the experts anew

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, -2)  # (R, H)
        topk_ids, topk_weights = self.gate(flat)
        self.experts.prefetch(topk_ids)
        shared = self.shared_experts(x)
        routed = self.experts(flat, topk_ids, topk_weights).to(x.dtype)
        return routed.view_as(x) + shared


def _apply_keeping_dtype(module: nn.Module, fn: Callable, names: Iterable[str]) -> nn.Module:
    """nn.Module._apply that moves but does not cast the named parameters: .to(dtype), .half(), .float() pass them by."""
    kept = {name: module._parameters[name].data for name in names}
    nn.Module._apply(module, fn)
    for name, old in kept.items():
        moved = module._parameters[name]
        if moved.dtype != old.dtype:
            moved.data = old.to(moved.device)
    return module
