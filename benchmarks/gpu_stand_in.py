"""Plain code behind the entry points of the Triton kernels, for a dry run of the GPU check where triton is missing.

It is right and slow, and it takes every block size without looking at it: what it proves is the command around the kernels.
"""

import math
from types import SimpleNamespace
from typing import NamedTuple

import torch

from kimi.kimi_experts import ExpertMatrices, run_experts
from kimi.modeling_kimi import hide


class DecodeBlocks(NamedTuple):
    outputs: int
    groups: int
    warps: int
    registers: int


class Decode(NamedTuple):
    gate_up: DecodeBlocks
    down: DecodeBlocks


class PrefillBlocks(NamedTuple):
    rows: int
    outputs: int
    words: int
    warps: int
    stages: int


class AttentionBlocks(NamedTuple):
    heads: int
    keys: int
    warps: int
    stages: int


SMALL = PrefillBlocks(16, 64, 16, 4, 2)
TABLE = ((12.0, SMALL, SMALL), (math.inf, SMALL._replace(rows=64), SMALL._replace(rows=64)))


def exact(x, ids, weights, gate, up, down):
    """fp64 inside, so that bf16 inputs do not round on the way, as in the kernels for few rows."""
    matrices = [ExpertMatrices(words, scales.double()) for words, scales in (gate, up, down)]
    return run_experts(x.double(), ids, weights, *matrices).float()


def run_experts_prefill(x, ids, weights, gate, up, down, blocks=None):
    return exact(x, ids, weights, gate, up, down)


def prefill_blocks(pairs_per_expert, x):
    return next((gate_up, down) for most, gate_up, down in TABLE if pairs_per_expert <= most)


def gate_up_decode(planes, ids, gate, up, blocks=None):
    x = planes.repeat_interleave(ids.shape[1], dim=0).unsqueeze(-1)
    flat = ids.flatten()
    gated, upped = (ExpertMatrices(*m).gathered(flat, torch.float32) @ x for m in (gate, up))
    return (torch.nn.functional.silu(gated) * upped).squeeze(-1)


def down_decode(hidden, ids, weights, down, blocks=None):
    flat = ids.flatten()
    output = ExpertMatrices(*down).gathered(flat, torch.float32) @ hidden.unsqueeze(-1)
    return (output.view(*ids.shape, -1) * weights.unsqueeze(-1)).sum(1)


def latent_attention(q_latent, q_pe, latent, k_pe, mask, scaling, lengths=None, blocks=None):
    query, key = torch.cat((q_latent, q_pe), -1).double(), torch.cat((latent, k_pe), -1).double()
    if lengths is not None:
        beyond = torch.arange(latent.shape[2], device=latent.device) >= lengths[:, None]
        query, key = query, key.masked_fill(beyond[:, None, :, None], 0)
        latent = latent.masked_fill(beyond[:, None, :, None], 0)
    scores = hide((query @ key.transpose(-1, -2) * scaling).float(), mask)
    if lengths is not None:
        scores = scores.masked_fill(beyond[:, None, None], float("-inf"))
    return (scores.softmax(-1).to(latent.dtype).double() @ latent.double()).to(q_latent.dtype), None


EXPERTS = SimpleNamespace(
    DECODE_UP_TO=16,
    DecodeBlocks=DecodeBlocks,
    PrefillBlocks=PrefillBlocks,
    DECODE=Decode(DecodeBlocks(2, 32, 1, 128), DecodeBlocks(4, 32, 1, 128)),
    PREFILL_HOPPER=TABLE,
    PREFILL_OTHER=TABLE,
    PREFILL_FP32=((math.inf, SMALL, SMALL),),
    run_experts_triton=exact,
    run_experts_decode=exact,
    run_experts_prefill=run_experts_prefill,
    prefill_blocks=prefill_blocks,
    to_planes=lambda x, dtype: x.to(dtype),
    gate_up_decode=gate_up_decode,
    down_decode=down_decode,
)
ATTENTION = SimpleNamespace(
    AttentionBlocks=AttentionBlocks,
    latent_attention_triton=latent_attention,
)
