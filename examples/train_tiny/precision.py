"""The type that products are taken in while training on a CPU."""

import torch


def product_dtype() -> torch.dtype:
    """bfloat16 where an x86 CPU has instructions for it and PyTorch uses them, else float32.

    Emulated, a bfloat16 product takes 6 to 7 times as long as a float32 one with AVX2, 2 to 3 times with AVX-512
    (768 x 256 x 1024, one EPYC held to them by ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA, torch 2.13).
    """
    has = torch.cpu.get_capabilities()
    native = has.get("avx512_bf16", False) or has.get("amx_bf16", False)
    return torch.bfloat16 if native and torch.backends.cpu.get_cpu_capability() == "AVX512" else torch.float32
