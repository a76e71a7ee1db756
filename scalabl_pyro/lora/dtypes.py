"""Number formats of the frozen weights, and which of them a device has instructions for."""

from __future__ import annotations

import torch

__all__ = ["DTYPES", "resolved", "slow_on_cpu"]

DTYPES = ("auto", "float32", "bfloat16", "float16")


def resolved(dtype: str, *, cpu: bool) -> str:
    """The number format itself, where ``auto`` is ``bfloat16`` if the device has instructions for
    it, and ``float32`` if not.

    :param dtype: one of :data:`DTYPES`.
    :param cpu: whether the model is on a CPU, or on GPUs.
    """
    if dtype != "auto":
        return dtype
    if cpu:
        fast = not slow_on_cpu(torch.bfloat16)
    else:
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if fast else "float32"


def slow_on_cpu(dtype: torch.dtype) -> bool:
    """Whether oneDNN has no matrix products of this type for this CPU, as without AVX-512, so that
    torch's own are taken: from ten to a hundred times slower than float32's."""
    if not torch.backends.mkldnn.is_available():
        return False
    has_products = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype in has_products and not has_products[dtype]()
