"""A part of the zoo: every check passes, or says why not."""

from __future__ import annotations

import pytest

from benchmarks.correctness import zoo
from scalabl_pyro.runs.checks import CHECKS

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
    outcomes = zoo.examine(kind, model_type)
    # Of the others nobody expects that they continue texts.
    expected = [name for name in CHECKS if kind == "causal" or name != "generation"]
    assert list(outcomes) == ["build", *expected]
    assert set(outcomes.values()) == {"ok"}


@pytest.mark.slow
def test_a_refusal_has_its_reason():
    outcomes = zoo.examine("classes", "longformer")
    assert "one draw at a time" in outcomes["draws at once"]
    assert outcomes["plain PEFT"] == outcomes["padded rows"] == outcomes["exported draw"] == "ok"
