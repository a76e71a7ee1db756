"""What bitsandbytes says when PEFT imports it, which is whenever PEFT itself is imported.

On CPUs with bfloat16 instructions it looks for an optional kernel, and warns if the package that
fetches it is not there. Nothing here needs that kernel: weights in 4 bits run without it.
"""

from __future__ import annotations

import logging

__all__: list[str] = []


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Failed to load CPU gemm_4bit_forward")


logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_news)
