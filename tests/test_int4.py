"""The int4 format against golden bits, a bit-by-bit oracle, and its own inverse."""

import json

import pytest
import torch

from conftest import DATA
from kimi.kimi_int4 import dequantize_int4, int4_linear, pack_int4, quantize_int4, unpack_int4

GOLDEN = json.loads((DATA / "int4_golden.json").read_bytes())


def bits(tensor: torch.Tensor) -> list:
    return (tensor.view(torch.int16).to(torch.int32) & 0xFFFF).tolist()


def golden_bf16(name: str) -> torch.Tensor:
    return torch.tensor(GOLDEN[name], dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("case", GOLDEN["bit_vectors"], ids=lambda c: f"{len(c['values_int'][0])} inputs")
def test_words_are_the_golden_words(case):
    values = torch.tensor(case["values_int"])
    packed = torch.tensor(case["packed_int32"], dtype=torch.int32)
    assert pack_int4(values).equal(packed)
    assert unpack_int4(packed, values.shape[-1]).tolist() == case["values_int"]


def test_one_word_decoded_by_hand():
    assert unpack_int4(torch.tensor([0x76543210], dtype=torch.int32)).tolist() == [
        -8,
        -7,
        -6,
        -5,
        -4,
        -3,
        -2,
        -1,
    ]


def test_golden_matrix_unpacks_and_dequantises_bit_for_bit():
    packed = torch.tensor(GOLDEN["weight_packed_int32"], dtype=torch.int32)
    scale = golden_bf16("weight_scale_bf16_bits")
    assert unpack_int4(packed).tolist() == GOLDEN["unpacked_int"]
    dense = dequantize_int4(packed, scale)
    # -0 and 0 are one value with two patterns; the golden stores what its producer's multiplication gave.
    assert bits(dense) == GOLDEN["dequant_bf16_bits"]
    exact = dequantize_int4(packed, scale, torch.float32)
    assert exact.tolist() == GOLDEN["dequant_fp32"]
    assert dense.equal(exact.bfloat16())
    y = int4_linear(torch.tensor(GOLDEN["x_fp32"]), packed, scale)
    torch.testing.assert_close(y, torch.tensor(GOLDEN["y_fp32_from_dequant_fp32"]), atol=1e-5, rtol=0)


def test_absmax_over_seven_is_the_golden_variant_and_idempotent():
    golden = GOLDEN["variant_absmax_over_7"]
    packed, scale = quantize_int4(golden_bf16("weight_bf16_bits"))
    assert scale.float().tolist() == golden["weight_scale_bf16"]
    assert packed.tolist() == golden["weight_packed_int32"]
    assert unpack_int4(packed).tolist() == golden["unpacked_int"]
    again, scale_again = quantize_int4(dequantize_int4(packed, scale, torch.float32))
    # The all-zero group keeps its codes, its scale stays the smallest step.
    assert again.equal(packed) and scale_again.equal(scale)


def oracle_value(words: list[int], m: int) -> int:
    """Input m of a row, by integer arithmetic on Python's unbounded ints."""
    return ((words[m // 8] & 0xFFFFFFFF) >> (4 * (m % 8))) % 16 - 8


@pytest.mark.parametrize("num_inputs", [8, 32, 40, 44, 64])
def test_pack_and_unpack_are_inverse_and_match_the_oracle(num_inputs):
    values = torch.randint(-8, 8, (3, 5, num_inputs), generator=torch.Generator().manual_seed(num_inputs))
    packed = pack_int4(values)
    assert packed.shape == (3, 5, -(-num_inputs // 8)) and packed.dtype == torch.int32
    assert unpack_int4(packed, num_inputs).equal(values.to(torch.int8))
    row = packed[2, 4].tolist()
    assert [oracle_value(row, m) for m in range(num_inputs)] == values[2, 4].tolist()


def test_slices_dequantise_to_slices():
    packed, scale = quantize_int4(torch.randn(6, 96, generator=torch.Generator().manual_seed(0)))
    dense = dequantize_int4(packed, scale)
    assert dequantize_int4(packed[2:4], scale[2:4]).equal(dense[2:4])
    assert dequantize_int4(packed[:, 4:8], scale[:, 1:2]).equal(dense[:, 32:64])


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_scales_of_any_float_dtype_are_read(scale_dtype):
    packed, scale = quantize_int4(torch.randn(4, 64), scale_dtype=scale_dtype)
    assert dequantize_int4(packed, scale, torch.bfloat16).dtype == torch.bfloat16
    error = dequantize_int4(packed, scale.bfloat16(), torch.float32) - dequantize_int4(
        packed, scale, torch.float32
    )
    assert error.abs().max() <= 2**-8 * 7 * scale.float().max()


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_packed_product_equals_dense_product(rows):
    generator = torch.Generator().manual_seed(rows)
    packed, scale = quantize_int4(torch.randn(48, 96, generator=generator))
    x = torch.randn(rows, 96, generator=generator)
    exact = x.double() @ dequantize_int4(packed, scale, torch.float64).T
    torch.testing.assert_close(int4_linear(x, packed, scale).double(), exact, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(int4_linear(x.bfloat16(), packed, scale).double(), exact, atol=0.2, rtol=2e-2)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"-8\.\.7, got values from -9 to 0"):
        pack_int4(torch.tensor([-9, 0]))
    with pytest.raises(ValueError, match="40 inputs are not a multiple of the group size 32"):
        quantize_int4(torch.zeros(2, 40))
