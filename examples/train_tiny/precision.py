"""The type that products are taken in while training on a CPU."""

import torch


def product_dtype() -> torch.dtype:
    """bfloat16 where an x86 CPU has instructions for it and PyTorch uses them, else float32.

    Emulated, a bfloat16 product takes several times as long as a float32 one (figures in docs/history.md, 2026-11-28).
    """
    has = torch.cpu.get_capabilities()
    native = has.get("avx512_bf16", False) or has.get("amx_bf16", False)
    return torch.bfloat16 if native and torch.backends.cpu.get_cpu_capability() == "AVX512" else torch.float32
