"""The architecture of Qwen2.5 (arXiv 2412.15115), so that nothing has to be fetched."""

from __future__ import annotations

from transformers import Qwen2Config

#: hidden size, blocks, heads, key-value heads, intermediate size, vocabulary, tied embeddings
_SIZES = {
    "0.5B": (896, 24, 14, 2, 4864, 151936, True),
    "7B": (3584, 28, 28, 4, 18944, 152064, False),
    "32B": (5120, 64, 40, 8, 27648, 152064, False),
    "72B": (8192, 80, 64, 8, 29568, 152064, False),
}
SIZES = tuple(_SIZES)


def qwen_config(size: str) -> Qwen2Config:
    """The configuration of Qwen2.5 in one of ``SIZES``."""
    hidden, blocks, heads, kv_heads, intermediate, vocabulary, tied = _SIZES[size]
    return Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=32768,
        rope_theta=1e6,
        tie_word_embeddings=tied,
        architectures=["Qwen2ForCausalLM"],
    )
