"""Bytes of the model by arithmetic, from its config alone: weights by kind, cache, and what a forward pass takes.

The tests compare every number here with the model itself, built on meta, or run on a CPU with its tensors counted.
The last section subtracts these sums from the memory that is free on this machine, for experts in a pool.
"""

from math import prod

import torch

from .configuration_kimi import KimiK25Config, KimiK25TextConfig, KimiK25VisionConfig
from .kimi_int4 import CODES_PER_WORD, GROUP_SIZE
from .kimi_machine import (
    CUDA_CONTEXT_BYTES,
    FRAGMENTATION_SHARE,
    HOST_RESERVE_BYTES,
    detect_gpus,
    detect_ram,
)

# For keys and values while they are expanded, or for scores, of one layer's call.
WORKSPACE_BYTES = 256 * 2**20  # at least; kimi_backends takes more of a GPU that has it free
LARGEST_WORKSPACE_BYTES = 4 * 2**30
AUTO_CONTEXT = 32768  # tokens of one sequence for which expert_cache="auto" leaves room
AUTO_CHUNK = 4096  # of them at once

# Bytes of whatever is neither packed nor the router's bias.
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
WEIGHT_KINDS = (
    "attention",
    "norms",
    "dense_mlp",
    "shared_experts",
    "router",
    "routed_experts",
    "embeddings",
    "lm_head",
    "vision",
    "projector",
)

# Per query and key: the boolean mask, SDPA's additive copy in bf16, and that copy padded to 16 columns.
MASK_BYTES = 5
VISION_PATCHES = 16384  # of one item: `in_patch_limit` of preprocessor_config.json, or 4 frames of 4096
VISION_BYTES_PER_PATCH_AND_CHANNEL = 48  # q and k rotate in fp32; the rest is in bf16


def weight_bytes(config: KimiK25Config, dtype: str = "bfloat16") -> dict[str, dict[str, int]]:
    """Bytes of every module that is placed whole, by path and kind, in the order a token passes them.

    Only int4 words, scales and shapes, and the router's bias, keep their size in another dtype.
    """
    text, size = config.text_config, DTYPE_BYTES[dtype]
    table, head = text.vocab_size * text.hidden_size * size, "language_model."
    modules = {
        "vision_tower": {"vision": _vision_elements(config.vision_config) * size},
        "mm_projector": {"projector": _projector_elements(config.vision_config) * size},
        f"{head}model.embed_tokens": {"embeddings": table},
    }
    for idx in range(text.num_hidden_layers):
        modules[f"{head}model.layers.{idx}"] = _layer_bytes(text, idx, size)
    modules[f"{head}model.norm"] = {"norms": text.hidden_size * size}
    modules[f"{head}lm_head"] = {"lm_head": table}
    return modules


def expert_bytes(text: KimiK25TextConfig, size: int = 2) -> int:
    """One routed expert: three matrices, each of words, bf16 scales and two int32 of shape; or dense."""
    elements = text.moe_intermediate_size * text.hidden_size
    if text.expert_quantization is None:
        return 3 * elements * size
    return 3 * (elements // CODES_PER_WORD * 4 + elements // GROUP_SIZE * 2 + 2 * 4)


def cache_bytes_per_token(text: KimiK25TextConfig, size: int = 2) -> int:
    """Of one layer: the latent and the rotated key, 576 values."""
    return (text.kv_lora_rank + text.qk_rope_head_dim) * size


def _layer_bytes(text: KimiK25TextConfig, idx: int, size: int) -> dict[str, int]:
    width, rank, latent, heads = (
        text.hidden_size,
        text.q_lora_rank,
        text.kv_lora_rank,
        text.num_attention_heads,
    )
    attention = (
        rank * width  # q_a_proj
        + rank  # q_a_layernorm
        + heads * text.qk_head_dim * rank  # q_b_proj
        + (latent + text.qk_rope_head_dim) * width  # kv_a_proj_with_mqa
        + latent  # kv_a_layernorm
        + heads * (text.qk_nope_head_dim + text.v_head_dim) * latent  # kv_b_proj
        + width * heads * text.v_head_dim  # o_proj
    )
    layer = {"attention": attention * size, "norms": 2 * width * size}
    if not text.is_moe_layer(idx):
        return {**layer, "dense_mlp": 3 * width * text.intermediate_size * size}
    return {
        **layer,
        "shared_experts": 3 * width * text.n_shared_experts * text.moe_intermediate_size * size,
        "router": text.n_routed_experts * (width * size + 4),
        "routed_experts": text.n_routed_experts * expert_bytes(text, size),
    }


def _vision_elements(vision: KimiK25VisionConfig) -> int:
    width, inner = vision.vt_hidden_size, vision.vt_intermediate_size
    block = (
        4 * width  # norm0, norm1
        + 3 * width * (width + 1)  # wqkv
        + width * (width + 1)  # wo
        + inner * (width + 1)  # mlp.fc0
        + width * (inner + 1)  # mlp.fc1
    )
    patches = width * (3 * vision.patch_size**2 + 1)
    table = vision.init_pos_emb_height * vision.init_pos_emb_width * width
    return patches + table + vision.vt_num_hidden_layers * block + 2 * width


def _projector_elements(vision: KimiK25VisionConfig) -> int:
    merged = prod(vision.merge_kernel_size) * vision.mm_hidden_size
    return 2 * vision.mm_hidden_size + merged * (merged + 1) + vision.text_hidden_size * (merged + 1)


def text_workspace_bytes(config: KimiK25Config, context: int, batch: int, chunk: int, size: int) -> int:
    """Most bytes alive on a device besides weights and cache, while `chunk` new tokens per sequence meet a full cache.

    The attention of one layer (expanded keys and values, or scores), its mask, the hidden states, one unpacked expert,
    and logits of the last token with the fp32 copies that sampling makes.
    """
    text = config.text_config
    width, inner, heads = text.hidden_size, text.moe_intermediate_size, text.num_attention_heads
    one_head = batch * context * (text.qk_nope_head_dim + text.v_head_dim + 2 * text.qk_head_dim) * size
    one_query = batch * heads * context * (8 + size)
    attention = max(WORKSPACE_BYTES, one_head, one_query)
    mask = batch * chunk * context * MASK_BYTES
    # Residual, normed, attended, inputs; fp32 inside norms and sums.
    states = 6 * width * size + 2 * width * 4
    chosen = text.num_experts_per_tok * ((width + 3 * inner) * size + width * 4)  # of a grouped product
    row = states + max(4 * heads * text.qk_head_dim * size, 3 * text.intermediate_size * size, chosen)
    unpacked = 3 * width * inner * (size + 1)
    logits = batch * text.vocab_size * (size + 5 * 4)
    return attention + mask + batch * chunk * row + unpacked + logits


def vision_workspace_bytes(config: KimiK25Config, patches: int = VISION_PATCHES) -> int:
    """Most bytes alive while the tower reads one item. The hidden states of the text do not exist then."""
    return patches * VISION_BYTES_PER_PATCH_AND_CHANNEL * config.vision_config.vt_hidden_size


# ------------------------------------------------------------------------------------------------------- free memory


def resident_bytes(config: KimiK25Config) -> int:
    """Of all weights but the routed experts, in the dtype in which from_pretrained makes the model."""
    kinds = weight_bytes(config, str(torch.get_default_dtype()).removeprefix("torch.")).values()
    return sum(size for module in kinds for kind, size in module.items() if kind != "routed_experts")


def free_bytes(device: torch.device, config: KimiK25Config) -> int:
    """What is free on a device now, less the cache and workspace of one sequence of AUTO_CONTEXT tokens and a reserve."""
    text = config.text_config
    context = min(AUTO_CONTEXT, text.max_position_embeddings)
    work = text_workspace_bytes(config, context, 1, min(AUTO_CHUNK, context), 2)
    work += context * text.num_hidden_layers * cache_bytes_per_token(text)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(free - work - FRAGMENTATION_SHARE * total)
    ram = detect_ram()
    if not ram:
        raise ValueError(
            'this system does not tell its free memory, so expert_cache="auto" cannot; give bytes.'
        )
    return ram - work - HOST_RESERVE_BYTES


def all_fit(config: KimiK25Config, with_gpus: bool) -> bool:
    """Whether every expert can be resident, in RAM or also on the GPUs."""
    text = config.text_config
    layers = sum(text.is_moe_layer(idx) for idx in range(text.num_hidden_layers))
    one = expert_bytes(text, torch.get_default_dtype().itemsize)
    weights = resident_bytes(config) + layers * text.n_routed_experts * one
    free = free_bytes(torch.device("cpu"), config)
    if with_gpus:
        free += sum(gpu.total_bytes - CUDA_CONTEXT_BYTES for gpu in detect_gpus())
    return weights <= free
