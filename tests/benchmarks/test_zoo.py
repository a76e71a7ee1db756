"""A part of the zoo: every check passes, or says why not."""

from __future__ import annotations

import pytest

from benchmarks.correctness import zoo

PASS = [
    ("causal", "llama"),
    ("causal", "gpt2"),
    ("causal", "qwen3_moe"),
    ("causal", "jamba"),
    ("classes", "modernbert"),
    ("choices", "bert"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "model_type"), PASS)
def test_an_architecture_passes_every_check(kind, model_type):
    found = zoo.examine(kind, model_type)
    assert len(found) == 8
    assert set(found.values()) == {"ok"}


@pytest.mark.slow
def test_a_refusal_has_its_reason():
    found = zoo.examine("classes", "longformer")
    assert "one draw at a time" in found["draws"]
    assert found["peft"] == found["alone"] == found["exported"] == "ok"
