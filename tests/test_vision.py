"""MoonViT and the projector against golden numbers made in float64, and the invariants of packing.

The golden tower is tiny (D 32, 2 blocks, an 8 x 8 position table) but has every rule of the real one. Its second set of
weights makes two things visible that the first one hides: which GELU is where, and the eps of the norms.
Everything runs on a CPU except the tests marked `gpu`.
"""

import functools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available

from conftest import DATA
from kimi.kimi_vision import (
    MoonViT,
    PatchMergerProjector,
    PositionEmbedding,
    choose_attention,
    merge_patches,
    resample_table,
    rope_angles,
    rotate_pairs,
    temporal_embedding,
)

GOLDEN = json.loads((DATA / "vision_golden.json").read_bytes())["vision"]
TOLERANCE = GOLDEN["tolerance"]["fp32_abs"]  # the golden file's own: float32 against float64
SET_1 = [(GOLDEN["weight_rule"]["amp_base_rules_first_match_wins"], case) for case in GOLDEN["cases"]]
SET_2 = [
    (GOLDEN["weight_set_2"]["amp_base_rules_first_match_wins"], case)
    for case in GOLDEN["weight_set_2"]["cases"]
]
CASES = SET_1 + SET_2
MIXED = next(case for case in GOLDEN["cases"] if case["name"] == "D_batch_mixed")
CPU = torch.device("cpu")

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_flash = pytest.mark.skipif(not is_flash_attn_2_available(), reason="needs a CUDA device and flash-attn")


def make_config(attention: str | None = "sdpa", **changes) -> SimpleNamespace:
    return SimpleNamespace(**{**GOLDEN["tiny_config"], **changes}, _attn_implementation=attention)


REAL_SIZES = {
    "vt_hidden_size": 1152,
    "vt_num_hidden_layers": 27,
    "vt_num_attention_heads": 16,
    "vt_intermediate_size": 4304,
    "init_pos_emb_height": 64,
    "init_pos_emb_width": 64,
    "mm_hidden_size": 1152,
    "text_hidden_size": 7168,
}


class Vision(nn.Module):
    """Tower and projector under the names they have in the checkpoint."""

    def __init__(self, config: SimpleNamespace):
        super().__init__()
        self.vision_tower = MoonViT(config)
        self.mm_projector = PatchMergerProjector(config)

    def forward(self, pixel_values: torch.Tensor, grid_thws: torch.Tensor) -> list[torch.Tensor]:
        return self.mm_projector(self.vision_tower(pixel_values, grid_thws))


def matches(condition: str, name: str) -> bool:
    """Reads the golden file's English: "name contains 'norm' and ends with 'weight'", "otherwise", ..."""
    contains = [part.split("'")[1] for part in condition.split(" and ") if "contains '" in part]
    ends = [part.split("'")[1] for part in condition.split(" and ") if "ends with '" in part]
    return all(word in name for word in contains) and all(name.endswith(word) for word in ends)


@functools.cache
def golden_weights(set_number: int) -> dict[str, torch.Tensor]:
    rules = CASES[0 if set_number == 1 else -1][0]
    weights = {}
    for k, (name, shape) in enumerate(GOLDEN["weight_rule"]["tensors"]):
        amp, base = next((amp, base) for condition, amp, base in rules if matches(condition, name))
        i = torch.arange(math.prod(shape))
        wave = torch.sin(0.37 * i.double() + 0.11 * ((i % 7) * (i % 5)).double() + 1.3 * k)
        weights[name] = (base + amp * wave).float().view(shape)
    return weights


def make_model(attention: str | None = "sdpa", set_number: int = 1) -> Vision:
    model = Vision(make_config(attention))
    model.load_state_dict(golden_weights(set_number))
    return model.eval()


def make_inputs(grids: list[list[int]], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    num_patches = sum(t * h * w for t, h, w in grids)
    i = torch.arange(num_patches * 3 * 14 * 14).double()
    pixel_values = torch.sin(0.013 * i + 0.5 * torch.cos(0.29 * i) + 0.7 * seed)
    return pixel_values.float().view(num_patches, 3, 14, 14), torch.tensor(grids)


def assert_close(actual: torch.Tensor, expected, what: str, tolerance: float = TOLERANCE) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert actual.shape == expected.shape, (
        f"{what}: shape {tuple(actual.shape)} is not {tuple(expected.shape)}"
    )
    diff = (actual.detach().cpu().double() - expected).abs()
    assert diff.max() <= tolerance, (
        f"{what} ({actual.dtype}): max difference {diff.max():.2e}, mean {diff.mean():.2e}, tolerance {tolerance:.1e}"
    )


def run_recording(
    model: Vision, pixel_values: torch.Tensor, grid_thws: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Runs the model and returns what each named stage gave, keyed as in the golden file without `_row0` and such."""
    tower = model.vision_tower
    stages = {
        "patch_embed_no_pos": tower.patch_embed.proj,
        "after_pos": tower.patch_embed,
        "block0_out": tower.encoder.blocks[0],
        "block1_out": tower.encoder.blocks[1],
        "last_hidden": tower.encoder.final_layernorm,
        "pooled": tower,
        "projected": model.mm_projector,
    }
    seen: dict[str, torch.Tensor] = {}

    def record(name: str):
        def hook(module, args, output):
            seen[name] = torch.cat(output) if isinstance(output, list) else output

        return hook

    handles = [module.register_forward_hook(record(name)) for name, module in stages.items()]
    with torch.no_grad():
        model(pixel_values, grid_thws)
    for handle in handles:
        handle.remove()
    return seen


# --- golden numbers -----------------------------------------------------------------------------------------------


def test_weights_and_pixels_are_those_of_the_golden_file():
    for name, index, value in GOLDEN["weight_rule"]["spot_checks"]:
        assert golden_weights(1)[name].flatten()[index].item() == pytest.approx(value, abs=1e-7)
    pixel_values, _ = make_inputs([[1, 4, 6]])
    for index, value in GOLDEN["input_rule"]["spot_checks_seed0"]:
        assert pixel_values.flatten()[index].item() == pytest.approx(value, abs=1e-7)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("rules, case", CASES, ids=[case["name"] for _, case in CASES])
def test_every_stage_gives_the_golden_numbers(rules, case, attention):
    model = make_model(attention, set_number=1 if rules is SET_1[0][0] else 2)
    seen = run_recording(model, *make_inputs(case["grid_thws"], case["seed"]))
    if case.get("projected") is not None:
        assert_close(seen["projected"], case["projected"], "projected")
    for key, expected in case.items():
        for suffix, row in (("_first_row", 0), ("_row0", 0), ("_last_row", -1), ("_first", 0)):
            if key.endswith(suffix):
                assert_close(seen[key.removesuffix(suffix)][row], expected, key)
                break
    for key, expected in case["checksums"].items():
        stage = seen[key.removesuffix("_sum").removesuffix("_abs")].double()
        total = (stage.abs() if key.endswith("_abs_sum") else stage).sum()
        assert total.item() == pytest.approx(expected, abs=TOLERANCE * stage.numel()), key


def test_rope_alternates_column_and_row_from_the_golden_frequencies():
    golden = GOLDEN["primitives"]["rope_real_head_dim_72"]
    angles = rope_angles([(2, 6, 8)], 72, CPU)  # (96, 36)
    row3_col5 = angles[3 * 8 + 5]
    assert_close(row3_col5[:6], golden["example_row3_col5_first6_angles"], "angles", 1e-6)
    freqs = torch.tensor(golden["freq"])
    assert_close(row3_col5, torch.stack((5 * freqs, 3 * freqs), dim=-1).flatten(), "all 36 angles", 1e-6)
    assert angles[:48].equal(angles[48:]), "frames do not rotate"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_turns_adjacent_pairs_in_float32(dtype):
    x, angles = torch.randn(5, 2, 3, 8).to(dtype), torch.rand(5, 1, 1, 4)
    even, odd, cos, sin = (
        x[..., ::2].double(),
        x[..., 1::2].double(),
        angles.double().cos(),
        angles.double().sin(),
    )
    expected = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    rotated = rotate_pairs(x, torch.polar(torch.ones_like(angles), angles))
    assert rotated.dtype == dtype
    # In bfloat16 only the result is rounded: by at most half a step, which is 2^-8 of the value.
    relative = 0 if dtype == torch.float32 else 2**-8
    assert ((rotated.double() - expected).abs() <= 1e-6 + relative * expected.abs()).all()


def test_frame_embedding_is_all_sines_then_all_cosines():
    golden = GOLDEN["primitives"]["temporal_D32"]
    table = temporal_embedding(2, 32, CPU)
    assert_close(table[0], golden["row0"], "frame 0", 1e-6)
    assert_close(table[1], golden["row1"], "frame 1", 1e-6)
    table = temporal_embedding(4, 1152, CPU)
    for frame, channel, value in GOLDEN["primitives"]["temporal_D1152_spots"]:
        assert table[frame, channel].item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("sizes, rows", GOLDEN["primitives"]["bicubic_rows"].items())
def test_resampling_has_the_golden_weights_on_each_axis(sizes, rows):
    table_size, size = map(int, sizes.split("->"))
    identity = torch.eye(table_size)  # channel j is 1 at place j, so that the output lists the weights
    by_row = resample_table(identity[:, None].expand(-1, 3, -1), size, 3).view(size, 3, table_size)
    by_col = resample_table(identity[None].expand(3, -1, -1), 3, size).view(3, size, table_size)
    assert_close(by_row[:, 1], rows, "rows", 1e-6)
    assert_close(by_col[1], rows, "columns", 1e-6)


def test_the_table_at_its_own_size_is_unchanged():
    table = torch.randn(8, 8, 32)
    assert resample_table(table, 8, 8).equal(table.flatten(0, 1))


def test_the_position_table_is_resampled_in_float32_and_rounded_once():
    pos_emb = PositionEmbedding(make_config())
    positions = pos_emb.bfloat16()([(2, 4, 6)])
    spatial = resample_table(pos_emb.weight.float(), 4, 6)
    assert positions.dtype == torch.float32
    assert positions.equal((spatial + temporal_embedding(2, 32, CPU)[:, None]).flatten(0, 1))


def test_norms_have_the_eps_they_were_trained_with():
    model = Vision(make_config(projector_ln_eps=1e-3))
    norms = {name: module.eps for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    assert norms.pop("mm_projector.pre_norm") == 1e-3
    assert len(norms) == 2 * 2 + 1
    assert set(norms.values()) == {1e-5}


def test_merge_takes_the_mean_of_frames_then_blocks_in_reading_order():
    frame = torch.arange(16.0).view(16, 1)  # a 4 x 4 grid numbered row by row
    (tokens,) = merge_patches(torch.cat((frame, frame + 10)), [(2, 4, 4)], [2, 2])
    assert (tokens[..., 0] - 5).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


# --- names and sizes of the real model ----------------------------------------------------------------------------


def checkpoint_shapes() -> dict[str, list[int]]:
    """The 335 tensors of the published checkpoint."""
    tower, projector = "vision_tower", "mm_projector"
    shapes = {
        f"{tower}.patch_embed.proj.weight": [1152, 3, 14, 14],
        f"{tower}.patch_embed.proj.bias": [1152],
        f"{tower}.patch_embed.pos_emb.weight": [64, 64, 1152],
    }
    linear = {"wqkv": (3456, 1152), "wo": (1152, 1152), "mlp.fc0": (4304, 1152), "mlp.fc1": (1152, 4304)}
    layers = {f"{tower}.encoder.blocks.{n}.{name}": size for n in range(27) for name, size in linear.items()}
    layers |= {f"{projector}.proj.0": (4608, 4608), f"{projector}.proj.2": (7168, 4608)}
    norms = [f"{tower}.encoder.blocks.{n}.norm{i}" for n in range(27) for i in (0, 1)]
    norms += [f"{tower}.encoder.final_layernorm", f"{projector}.pre_norm"]
    for name, (out_size, in_size) in layers.items():
        shapes |= {f"{name}.weight": [out_size, in_size], f"{name}.bias": [out_size]}
    for name in norms:
        shapes |= {f"{name}.weight": [1152], f"{name}.bias": [1152]}
    return shapes


def test_real_size_has_the_names_shapes_and_counts_of_the_checkpoint():
    with torch.device("meta"):
        model = Vision(make_config(**REAL_SIZES))
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == checkpoint_shapes()
    assert len(shapes) == 335
    counts = [sum(p.numel() for p in part.parameters()) for part in (model.vision_tower, model.mm_projector)]
    assert counts == [GOLDEN["parameter_count"]["tower_total"], GOLDEN["parameter_count"]["proj"]]
    assert counts == [416_866_032, 54_277_888]


def test_a_model_built_on_meta_needs_nothing_but_its_weights():
    with torch.device("meta"):
        model = Vision(make_config())
    assert list(model.buffers()) == []
    model.load_state_dict(golden_weights(1), assign=True)
    outputs = model.eval()(*make_inputs(MIXED["grid_thws"], MIXED["seed"]))
    assert_close(torch.cat(outputs), MIXED["projected"], "projected")


def test_reset_parameters_fills_the_position_table():
    pos_emb = PositionEmbedding(make_config())
    nn.init.constant_(pos_emb.weight, float("nan"))
    pos_emb.reset_parameters()
    assert 0.01 < pos_emb.weight.std() < 0.03


# --- packing --------------------------------------------------------------------------------------------------------

PACK = [[1, 4, 6], [3, 4, 4], [3, 4, 4], [3, 4, 4], [1, 4, 4], [1, 2, 2], [4, 2, 6], [2, 4, 6]]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_packed_items_are_as_each_item_alone(attention):
    model = make_model(attention)
    pixel_values, grid_thws = make_inputs(PACK)
    packed = model(pixel_values, grid_thws)
    assert [len(item) for item in packed] == [h // 2 * w // 2 for _, h, w in PACK]
    parts = pixel_values.split([t * h * w for t, h, w in PACK])
    for item, part, grid in zip(packed, parts, grid_thws, strict=True):
        (alone,) = model(part, grid[None])
        assert_close(item, alone, f"item {grid.tolist()}")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_items_never_see_each_other_and_frames_of_an_item_do(attention):
    model = make_model(attention)
    pixel_values, grid_thws = make_inputs(PACK)
    lengths = [t * h * w for t, h, w in PACK]
    pixel_values.requires_grad_()
    outputs = model(pixel_values, grid_thws)
    for i, output in enumerate(outputs):
        (grad,) = torch.autograd.grad(output[0].square().sum(), pixel_values, retain_graph=True)
        # Per item: patches that matter.
        reached = [part.flatten(1).any(dim=1) for part in grad.split(lengths)]
        assert reached[i].all(), "every patch of every frame matters to the first token of its item"
        assert not any(part.any() for j, part in enumerate(reached) if j != i), (
            "no patch of another item does"
        )


@torch.no_grad()
def test_a_chunk_of_one_frame_is_an_image_and_equal_frames_are_not():
    model = make_model()
    frame, image_grid = make_inputs([[1, 4, 6]])
    (image,) = model(frame, image_grid)
    two_frames, video_grid = torch.cat((frame, frame)), torch.tensor([[2, 4, 6]])
    (video,) = model(two_frames, video_grid)
    assert video.shape == image.shape
    assert (video - image).abs().max() > 0.1, (
        "frame 0 of a chunk of two receives temporal[0], an image does not"
    )


def test_projector_takes_a_single_tensor_too():
    model = make_model()
    merged = torch.randn(6, 4, 32)
    (alone,) = model.mm_projector(merged)
    (listed,) = model.mm_projector([merged])
    assert alone.equal(listed)
    assert alone.shape == (6, 16)


# --- attention ------------------------------------------------------------------------------------------------------


def varlen_kernel(module, query, key, value, attention_mask, *, dropout, scaling, is_causal, **lengths):
    """Stands where transformers puts flash attention: same call, (1, H, P, hd) in, (1, P, H, hd) out, by loops."""
    assert module.config._attn_implementation == "flash_attention_2"
    assert (attention_mask, dropout, is_causal) == (None, 0.0, False)
    cu_seqlens = lengths["cu_seq_lens_q"]
    assert cu_seqlens.dtype == torch.int32
    assert cu_seqlens.equal(lengths["cu_seq_lens_k"])
    assert lengths["max_length_q"] == lengths["max_length_k"] == cu_seqlens.diff().max().item()
    out = torch.empty_like(query)
    for start, stop in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        q, k, v = (part[:, :, start:stop] for part in (query, key, value))
        out[:, :, start:stop] = (q @ k.transpose(-1, -2) * scaling).softmax(dim=-1) @ v
    return out.transpose(1, 2), None


@torch.no_grad()
def test_flash_attention_is_called_as_transformers_expects(monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", varlen_kernel)
    outputs = make_model("flash_attention_2")(*make_inputs(MIXED["grid_thws"], MIXED["seed"]))
    assert_close(torch.cat(outputs), MIXED["projected"], "projected")


def test_choice_of_attention():
    assert choose_attention(None) is choose_attention("sdpa")
    assert len({choose_attention(name) for name in ("eager", "sdpa", "flash_attention_2")}) == 3
    for name in ("flex_attention", "flash_attention_9"):
        with pytest.raises(ValueError, match=f"no attention '{name}'"):
            choose_attention(name)


@torch.no_grad()
def test_attention_can_be_changed_on_a_built_model():
    model = make_model("sdpa")
    model.vision_tower.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="no attention 'flex_attention'"):
        model(*make_inputs([[1, 2, 2]]))


@pytest.mark.gpu
@needs_cuda
@torch.no_grad()
def test_sdpa_on_a_gpu_gives_the_golden_numbers():
    pixel_values, grid_thws = make_inputs(MIXED["grid_thws"], MIXED["seed"])
    outputs = make_model().cuda()(pixel_values.cuda(), grid_thws.cuda())
    # TF32 is off by default for matmuls; sums in another order stay within ten times the CPU's tolerance
    assert_close(torch.cat(outputs), MIXED["projected"], "projected", 10 * TOLERANCE)


@pytest.mark.gpu
@needs_flash
@torch.no_grad()
def test_flash_attention_is_close_to_sdpa_in_bfloat16():
    pixel_values, grid_thws = make_inputs(PACK)
    flash, sdpa = (
        torch.cat(make_model(name).cuda().bfloat16()(pixel_values.cuda(), grid_thws.cuda()))
        for name in ("flash_attention_2", "sdpa")
    )
    assert_close(flash, sdpa.cpu().double(), "projected", 0.1)  # bf16 alone costs 0.03 (sdpa, CPU)


# --- dtypes and gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_bfloat16_stays_bfloat16(attention):
    model = make_model(attention).bfloat16()
    pixel_values, grid_thws = make_inputs(MIXED["grid_thws"], MIXED["seed"])
    assert pixel_values.dtype == torch.float32
    seen = run_recording(model, pixel_values, grid_thws)
    assert {stage: x.dtype for stage, x in seen.items()} == dict.fromkeys(seen, torch.bfloat16)
    mean_error = (seen["projected"].float() - torch.tensor(MIXED["projected"])).abs().mean()
    assert mean_error < 0.02, "values are of order 1 and bfloat16 has steps of 2^-8"


def gradients(model: Vision) -> dict[str, torch.Tensor]:
    outputs = model(*make_inputs(MIXED["grid_thws"], MIXED["seed"]))
    torch.cat(outputs).square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_every_weight_gets_the_same_gradient_with_checkpointing(use_reentrant):
    plain = gradients(make_model().train())
    model = make_model().train()
    calls = []

    def counting_checkpoint(function, *args):
        calls.append(function)
        return checkpoint(function, *args, use_reentrant=use_reentrant)

    for block in model.vision_tower.encoder.blocks:  # what gradient_checkpointing_enable() sets
        block.gradient_checkpointing = True
        block._gradient_checkpointing_func = counting_checkpoint
    checkpointed = gradients(model)
    assert len(calls) == 2
    for name, grad in plain.items():
        assert grad is not None and grad.abs().sum() > 0, name
        torch.testing.assert_close(checkpointed[name], grad, msg=lambda text, name=name: f"{name}: {text}")


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "grids, num_patches, sentence",
    [
        ([[1, 4, 6], [2, 2, 2]], 31, "the 2 grids of grid_thws make 32 patches but pixel_values has 31"),
        ([[1, 4, 6]], 0, "make 24 patches but pixel_values has 0"),
        ([[1, 2, 2], [5, 2, 2]], 24, r"grid_thws\[1\] has t = 5 frames, expected 1 to 4"),
        ([[0, 2, 2]], 0, "t = 0 frames, expected 1 to 4"),
        ([[1, 3, 4]], 12, "h, w = 3, 4 patches, not multiples of 2 and 2"),
        ([[1, 4, 3]], 12, "h, w = 4, 3 patches, not multiples of 2 and 2"),
        ([[1, 514, 2]], 1028, "h, w = 514, 2 patches, expected 1 to 512 each"),
        ([[1, 2, 514]], 1028, "h, w = 2, 514 patches, expected 1 to 512 each"),
        ([[1, 0, 4]], 0, "h, w = 0, 4 patches, expected 1 to 512"),
        ([[1, -2, -2]], 4, "h, w = -2, -2 patches, expected 1 to 512"),
    ],
)
def test_grids_that_cannot_be_are_refused(grids, num_patches, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_model()(torch.zeros(num_patches, 3, 14, 14), torch.tensor(grids))


@pytest.mark.parametrize("shape", [(4, 588), (4, 3, 14, 16), (4, 1, 14, 14), (1, 4, 3, 14, 14)])
def test_pixel_values_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"pixel_values has shape .*, expected \(P, 3, 14, 14\)"):
        make_model()(torch.zeros(shape), torch.tensor([[1, 2, 2]]))


@pytest.mark.parametrize("shape", [(3,), (1, 2), (0, 3), (1, 1, 3)])
def test_grid_thws_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"grid_thws has shape .*, expected \(N, 3\)"):
        make_model()(torch.zeros(4, 3, 14, 14), torch.ones(shape, dtype=torch.int64))


def test_the_longest_side_is_accepted():
    with torch.no_grad():
        (item,) = make_model()(torch.zeros(1024, 3, 14, 14), torch.tensor([[1, 2, 512]]))
    assert item.shape == (256, 16)
