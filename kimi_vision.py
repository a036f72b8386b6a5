"""MoonViT and the projector: patches of images and video chunks in, token embeddings for the decoder out.

The letters used for shapes, with the sizes of Kimi K2.7 Code:

    N   media items of one call: images, and video chunks of up to 4 frames
    P   patches of all items, one item after the other; in an item frame by frame, in a frame row by row
    M   merged tokens of all items
    D   width of the tower, 1152
    H   heads, 16, of hd = D / H = 72 values each
    t, h, w   one item's frames, rows and columns, counted in patches

    pixel_values (P, 3, 14, 14), normalised RGB; grid_thws (N, 3), rows (t, h, w); P = sum of t*h*w
      patch_embed               one linear map per patch, plus a position embedding -> (P, D)
      encoder.blocks, 27 times  x += wo(attention(norm0(x)));  x += fc1(gelu(fc0(norm1(x))))
      encoder.final_layernorm   (P, D)
      merge_patches             mean over frames, 2 x 2 neighbours side by side -> per item (h/2 * w/2, 4, D)
      mm_projector              norm of each neighbour, concatenate, MLP -> per item (h/2 * w/2, 7168)

Positions enter twice. Before the first block an embedding is added: a learned 64 x 64 table, resampled to
h x w, and, in items of several frames only, sines and cosines of the frame number. In every block queries and
keys are rotated by row and column; frames do not rotate. So a chunk of one frame is exactly an image.

All items are packed into one sequence, whatever their sizes, and never attend to each other: attention stays inside the
item, where every patch of every frame sees every other. An item makes as many tokens as one of its frames would.

Nothing but the weights is stored. Positions are computed from the grids in each call: a table kept as a
buffer stays uninitialised when the model is built on the meta device, as `from_pretrained` does.

There are two GELUs, as the weights were trained: the tower's is the tanh approximation, the projector's is
exact.
Architecture: MoonViT in Kimi-VL (arXiv:2504.07491), with the video chunks of Kimi K2.5.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_kimi import KimiK25VisionConfig

Grid = tuple[int, int, int]  # (t, h, w) of one item, on the host

MAX_SIDE = 512  # patches; `patch_limit_on_one_side` in preprocessor_config.json
ROPE_THETA = 10000.0  # of the rotation and of the frame embedding alike; config.json has no field for it


class MoonViT(nn.Module):
    """`vision_tower`: (P, 3, 14, 14) patches -> one (h/2 * w/2, 4, D) tensor per item."""

    def __init__(self, config: KimiK25VisionConfig):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.encoder = Encoder(config)

    def forward(self, pixel_values: Tensor, grid_thws: Tensor) -> list[Tensor]:
        """Encodes all items in one go.

        Args:
            pixel_values: (P, 3, 14, 14), any float dtype; cast to the dtype of the weights.
            grid_thws: (N, 3) integers (t, h, w), on any device.

        Raises:
            ValueError: if the shapes, the sizes in the grids and the number of patches do not fit together.
        """
        patch = self.config.patch_size
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != (3, patch, patch):
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}, expected (P, 3, {patch}, {patch})."
            )
        merge = self.config.merge_kernel_size
        grids = read_grids(grid_thws, pixel_values.shape[0], self.config.init_pos_emb_time, merge)
        x = self.patch_embed(pixel_values, grids)  # (P, D)
        x = self.encoder(x, grids)  # (P, D)
        return merge_patches(x, grids, merge)


class PatchMergerProjector(nn.Module):
    """`mm_projector`: the 4 neighbours of a merged token -> one embedding of the decoder's width.

    `pre_norm` runs over each neighbour's D values on its own, before they are concatenated. Its eps is
    `projector_ln_eps`; its input width is the tower's (`mm_hidden_size`), not the text's.
    """

    def __init__(self, config: KimiK25VisionConfig):
        super().__init__()
        rows, cols = config.merge_kernel_size
        merged_size = rows * cols * config.mm_hidden_size
        self.pre_norm = nn.LayerNorm(config.mm_hidden_size, eps=config.projector_ln_eps)
        self.proj = nn.Sequential(
            nn.Linear(merged_size, merged_size),
            nn.GELU(),  # exact (erf), unlike the tower's
            nn.Linear(merged_size, config.text_hidden_size),
        )

    def forward(self, items: Sequence[Tensor] | Tensor) -> list[Tensor]:
        """(tokens_i, 4, D) per item, as a list or a single tensor -> list of (tokens_i, text_hidden_size)."""
        if isinstance(items, Tensor):
            items = [items]
        x = self.pre_norm(torch.cat(list(items)))  # (M, 4, D)
        x = self.proj(x.flatten(1))  # (M, text_hidden_size)
        return list(x.split([len(item) for item in items]))


class PatchEmbed(nn.Module):
    """Patches to vectors with their position embedding: (P, 3, 14, 14) -> (P, D)."""

    def __init__(self, config: KimiK25VisionConfig):
        super().__init__()
        patch = config.patch_size
        self.proj = PatchProjection(3, config.vt_hidden_size, kernel_size=patch, stride=patch)
        self.pos_emb = PositionEmbedding(config)

    def forward(self, pixel_values: Tensor, grids: list[Grid]) -> Tensor:
        x = self.proj(pixel_values)  # (P, D)
        # Cast before the sum: float32 plus bfloat16 is float32, which the first LayerNorm would refuse.
        return x + self.pos_emb(grids).to(x.dtype)


class PatchProjection(nn.Conv2d):
    """The patch convolution, cut to the one position it has in a patch: a matmul over (c, y, x) order."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = pixel_values.to(self.weight.dtype).flatten(1)  # (P, 3 * 14 * 14)
        return F.linear(patches, self.weight.flatten(1), self.bias)  # (P, D)


class PositionEmbedding(nn.Module):
    """Position of a patch: spatial[row, col], plus temporal[frame] in items of several frames.

    `weight` (64, 64, D) is the learned table, indexed (row, col); `spatial` is that table resampled to h x w.
    """

    def __init__(self, config: KimiK25VisionConfig):
        super().__init__()
        height, width = config.init_pos_emb_height, config.init_pos_emb_width
        self.weight = nn.Parameter(torch.empty(height, width, config.vt_hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, grids: list[Grid]) -> Tensor:
        """Returns (P, D) in float32, whatever the table's dtype: to be rounded once, after the sum."""
        dim = self.weight.shape[-1]
        sizes = {(h, w) for _, h, w in grids}  # the chunks of a video share one
        spatial = {size: resample_table(self.weight, *size) for size in sizes}  # (h*w, D) each
        temporal = temporal_embedding(max(t for t, _, _ in grids), dim, self.weight.device)  # (t_max, D)
        items = []
        for t, h, w in grids:
            item = spatial[h, w].expand(t, h * w, dim)
            if t > 1:  # temporal[0] is not zero, so an image must not receive it, and frame 0 of a chunk must
                item = item + temporal[:t, None]
            items.append(item.flatten(0, 1))  # (t*h*w, D)
        return torch.cat(items)


class Encoder(nn.Module):
    """The blocks and the last norm, with what they share: angles, segments, choice of attention."""

    def __init__(self, config: KimiK25VisionConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.vt_hidden_size // config.vt_num_attention_heads
        self.blocks = nn.ModuleList(MoonViTBlock(config) for _ in range(config.vt_num_hidden_layers))
        self.final_layernorm = nn.LayerNorm(config.vt_hidden_size)

    def forward(self, x: Tensor, grids: list[Grid]) -> Tensor:
        """(P, D) -> (P, D)."""
        attend = choose_attention(self.config._attn_implementation)
        segments = Segments.of(grids, x.device)
        angles = rope_angles(grids, self.head_dim, x.device)[:, None, None]  # (P, 1, 1, hd/2), float32
        rotation = torch.polar(torch.ones_like(angles), angles)  # (P, 1, 1, hd/2), complex64
        for block in self.blocks:
            x = block(x, rotation, segments, attend)
        return self.final_layernorm(x)


class MoonViTBlock(GradientCheckpointingLayer):
    """One pre-norm transformer block. Its norms have torch's eps, 1e-5; the config has no field for it."""

    def __init__(self, config: KimiK25VisionConfig):
        super().__init__()
        dim = config.vt_hidden_size
        self.config = config  # transformers' flash attention reads `_attn_implementation` from its caller
        self.num_heads = config.vt_num_attention_heads
        self.norm0 = nn.LayerNorm(dim)
        self.norm1 = nn.LayerNorm(dim)
        self.wqkv = nn.Linear(dim, 3 * dim)
        self.wo = nn.Linear(dim, dim)
        self.mlp = MLP(dim, config.vt_intermediate_size)

    def forward(self, x: Tensor, rotation: Tensor, segments: "Segments", attend: "Attention") -> Tensor:
        """(P, D) -> (P, D). Call it with positional arguments: gradient checkpointing tracks only those."""
        qkv = self.wqkv(self.norm0(x)).unflatten(-1, (3, self.num_heads, -1))  # (P, 3, H, hd)
        q, k = rotate_pairs(qkv[:, :2], rotation).unbind(1)  # (P, H, hd) each
        x = x + self.wo(attend(self, q, k, qkv[:, 2], segments).flatten(1))
        return x + self.mlp(self.norm1(x))


class MLP(nn.Module):
    def __init__(self, dim: int, intermediate_size: int):
        super().__init__()
        self.fc0 = nn.Linear(dim, intermediate_size)
        self.fc1 = nn.Linear(intermediate_size, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc1(F.gelu(self.fc0(x), approximate="tanh"))  # unlike the projector's exact GELU


# --- grids and segments -------------------------------------------------------------------------------------


def read_grids(grid_thws: Tensor, num_patches: int, max_frames: int, merge: Sequence[int]) -> list[Grid]:
    """Brings the (N, 3) grids to the host, and checks them and their sum against the number of patches.

    This is the tower's only wait for the device. Every view, split and segment length below is a number from
    here; read where they are used, the same numbers would stop the queue once per block.
    """
    if grid_thws.ndim != 2 or grid_thws.shape[1] != 3 or len(grid_thws) == 0:
        raise ValueError(f"grid_thws has shape {tuple(grid_thws.shape)}, expected (N, 3) with N >= 1.")
    grids = [(t, h, w) for t, h, w in grid_thws.tolist()]
    rows, cols = merge
    for i, (t, h, w) in enumerate(grids):
        if not 1 <= t <= max_frames:
            raise ValueError(
                f"grid_thws[{i}] has t = {t} frames, expected 1 to {max_frames}: cut the video in chunks."
            )
        if not (1 <= h <= MAX_SIDE and 1 <= w <= MAX_SIDE):
            raise ValueError(f"grid_thws[{i}] has h, w = {h}, {w} patches, expected 1 to {MAX_SIDE} each.")
        if h % rows or w % cols:
            raise ValueError(
                f"grid_thws[{i}] has h, w = {h}, {w} patches, not multiples of {rows} and {cols}: pad it."
            )
    expected = sum(t * h * w for t, h, w in grids)
    if expected != num_patches:
        raise ValueError(
            f"the {len(grids)} grids of grid_thws make {expected} patches but pixel_values has {num_patches}."
        )
    return grids


class Segments(NamedTuple):
    """Where each item is in the packed sequence, in the forms that the attention implementations take."""

    lengths: list[int]  # t*h*w per item, on the host
    cu_seqlens: Tensor  # (N + 1,) int32 on the device: 0, then the ends of the items
    max_seqlen: int

    @classmethod
    def of(cls, grids: list[Grid], device: torch.device) -> "Segments":
        lengths = [t * h * w for t, h, w in grids]
        cu_seqlens = torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32, device=device)
        return cls(lengths, cu_seqlens, max(lengths))


# --- positions ----------------------------------------------------------------------------------------------


def resample_table(table: Tensor, height: int, width: int) -> Tensor:
    """Bicubic resampling of a (rows, cols, D) table to (height * width, D), in float32.

    Keys' kernel with a = -0.75 at half-pixel centres, edge values repeated, no antialiasing even when
    shrinking: what `F.interpolate` does. The table's own size gives the table's values, unchanged.
    """
    image = table.float().permute(2, 0, 1)[None]  # (1, D, rows, cols)
    image = F.interpolate(image, size=(height, width), mode="bicubic", align_corners=False)
    return image[0].flatten(1).T  # (height * width, D)


def temporal_embedding(num_frames: int, dim: int, device: torch.device) -> Tensor:
    """(num_frames, dim) float32: row f holds sin(f * omega_j) for all j, then cos(f * omega_j) for all j.

    omega_j = 10000^(-j / (dim/2)), j = 0 .. dim/2 - 1.
    """
    j = torch.arange(dim // 2, dtype=torch.float32, device=device)
    omega = ROPE_THETA ** (-j / (dim // 2))  # (dim/2,)
    angles = torch.arange(num_frames, device=device)[:, None] * omega  # (num_frames, dim/2)
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


def rope_angles(grids: list[Grid], head_dim: int, device: torch.device) -> Tensor:
    """(P, hd/2) float32: the angle by which pair p of a head turns, for every patch.

    Column and row take turns, column first: pair 2i turns by col * freq_i, pair 2i + 1 by row * freq_i, with
    freq_i = 10000^(-4i / hd). Rows and columns count from 0 in every item; its frames repeat them.
    float32, because bfloat16 has no 301: column 301 would turn like column 300.
    """
    i = torch.arange(head_dim // 4, dtype=torch.float32, device=device)
    freqs = ROPE_THETA ** (-4 * i / head_dim)  # (hd/4,)
    spatial = {}
    for h, w in {(h, w) for _, h, w in grids}:
        by_row = (torch.arange(h, device=device)[:, None] * freqs)[:, None].expand(h, w, -1)
        by_col = (torch.arange(w, device=device)[:, None] * freqs)[None].expand(h, w, -1)
        spatial[h, w] = torch.stack((by_col, by_row), dim=-1).reshape(h * w, -1)  # (h*w, hd/2)
    return torch.cat([spatial[h, w].repeat(t, 1) for t, h, w in grids])


def rotate_pairs(x: Tensor, rotation: Tensor) -> Tensor:
    """Turns each adjacent pair (x[2p], x[2p+1]) of (..., hd), read as a complex number, in float32.

    rotation: (..., hd/2) complex64, of modulus 1. One product of complex numbers takes half to a fifth of the time of
    sines and cosines spelled out (CPU).
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # (..., hd/2)
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)


# --- attention inside each item -----------------------------------------------------------------------------
# Three implementations of one signature; q, k, v and the result are (P, H, hd). Only the last one needs the
# block, from which transformers reads its settings.

Attention = Callable[["MoonViTBlock", Tensor, Tensor, Tensor, Segments], Tensor]


def choose_attention(name: str | None) -> Attention:
    """The attention for a value of `config._attn_implementation`; "sdpa" if none was asked for."""
    if name == "eager":
        return masked_attention
    if name in (None, "sdpa"):
        return segment_attention
    if "flash" in name and name in ALL_ATTENTION_FUNCTIONS:
        return varlen_attention
    raise ValueError(f"MoonViT has no attention {name!r}; choose 'sdpa', 'eager' or 'flash_attention_2'.")


def masked_attention(block: "MoonViTBlock", q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """The reference: every score of the pack in float32, those between two items excluded by a mask.

    Memory grows with P squared: the largest image (17,856 patches) would need 20 GB for its scores alone.
    """
    num_items = len(segments.lengths)
    lengths = torch.tensor(segments.lengths, device=q.device)
    item_ids = torch.arange(num_items, device=q.device).repeat_interleave(lengths, output_size=len(q))  # (P,)
    same_item = item_ids[:, None] == item_ids  # (P, P)
    scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * q.shape[-1] ** -0.5  # (H, P, P)
    probs = scores.masked_fill(~same_item, float("-inf")).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", probs, v.float()).to(v.dtype)


def segment_attention(block: "MoonViTBlock", q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """SDPA without a mask, once per run of items of equal length: the chunks of a video go as one batch.

    One call with a block mask computes every score between items too: 5 to 6 times as slow for 8 small images.
    """
    runs = [(length, len(list(run))) for length, run in groupby(segments.lengths)]
    sizes = [length * count for length, count in runs]
    outputs = []
    for (_, count), *qkv in zip(runs, q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
        # (count, H, length, hd)
        q_run, k_run, v_run = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in qkv)
        # Every block of queries reads all keys and values. Head by head in memory, a large image takes 12 % less time.
        k_run, v_run = k_run.contiguous(), v_run.contiguous()
        out = F.scaled_dot_product_attention(q_run, k_run, v_run, scale=q.shape[-1] ** -0.5)
        outputs.append(out.transpose(1, 2).flatten(0, 1))  # (count * length, H, hd)
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def varlen_attention(block: "MoonViTBlock", q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """Flash attention as transformers provides it, told by cumulative lengths where the items end."""
    attend = ALL_ATTENTION_FUNCTIONS[block.config._attn_implementation]
    out, _ = attend(
        block,
        *(x.transpose(0, 1)[None] for x in (q, k, v)),  # (1, H, P, hd) each
        attention_mask=None,
        dropout=0.0,
        scaling=q.shape[-1] ** -0.5,
        is_causal=False,
        cu_seq_lens_q=segments.cu_seqlens,
        cu_seq_lens_k=segments.cu_seqlens,
        max_length_q=segments.max_seqlen,
        max_length_k=segments.max_seqlen,
    )
    return out[0]  # from (1, P, H, hd)


# --- from patches to tokens ---------------------------------------------------------------------------------


def merge_patches(x: Tensor, grids: list[Grid], merge: Sequence[int]) -> list[Tensor]:
    """(P, D) -> per item (h/2 * w/2, 4, D): the mean over its frames, regrouped into 2 x 2 blocks.

    Blocks come row by row; inside a block top left, top right, bottom left, bottom right.
    """
    rows, cols = merge
    tokens = []
    for item, (t, h, w) in zip(x.split([t * h * w for t, h, w in grids]), grids, strict=True):
        frame = item.view(t, h * w, -1).mean(dim=0)  # (h*w, D)
        blocks = frame.view(h // rows, rows, w // cols, cols, -1).transpose(1, 2)  # (h/2, w/2, 2, 2, D)
        tokens.append(blocks.flatten(0, 1).flatten(1, 2))  # (h/2 * w/2, 4, D)
    return tokens
