"""Random in the upper blocks alone, against the diagonal guide where nothing else is adapted."""

from __future__ import annotations

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from conftest import lora, tiny_llama, whole
from scipy import stats
from torch import nn

from scalabl_pyro import FitConfig, ScalaBLModel, SubspaceAdapter, fit
from scalabl_pyro.data import PROMPTS
from scalabl_pyro.guides import make_guide
from scalabl_pyro.methods import ScalaBL
from scalabl_pyro.prediction.draws import draw
from scalabl_pyro.readouts import LabelTokens

CONFIG = FitConfig(steps=5, batch_size=4, lr=0.01)


@pytest.fixture
def make_upper(tokenizer):
    """Adapters on the upper one of two blocks alone."""

    def make(**options):
        readout = LabelTokens(tokenizer, PROMPTS["letters"], "ABCD", max_length=64)
        config = lora("q_proj", "v_proj", layers_to_transform=[1])
        return SubspaceAdapter(tiny_llama(), config, readout, **options)

    return make


def test_where_the_last_block_alone_is_adapted_it_is_the_diagonal_guide(make_upper, records):
    split = make_upper().readout.encode(records)
    fits = []
    for guide in ({"name": "normal"}, {"name": "top_normal", "blocks": 1}):
        fitted = ScalaBL(CONFIG, progress=False, guide=guide).fit(make_upper, split, None, seed=0)
        fits.append((fitted.predictor.draws, fitted.predictor.logits(whole(split))))
        kl = [row["kl"] for row in fitted.result.history]
        fits[-1] += (torch.tensor(kl),)
    for one, two in zip(*fits, strict=True):
        torch.testing.assert_close(one, two)


def test_below_it_is_the_point_guide(make_causal, records):
    """With almost no spread above, the point guide's objective and its steps."""
    ends = []
    for name, options in (("delta", {}), ("top_normal", {"blocks": 1, "init_scale": 1e-6})):
        adapter = make_causal(targets=("q_proj", "v_proj"))
        split = adapter.readout.encode(records)
        model = ScalaBLModel(adapter, num_data=len(split))
        guide = make_guide(model, name, **options)
        torch.manual_seed(0)
        history = fit(model, guide, split, CONFIG, progress=False).history
        ends.append((guide.loc.detach()[:2], history[-1]["nll"]))
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=1e-3, atol=1e-4)
    assert ends[0][1] == pytest.approx(ends[1][1], rel=1e-3)


@pytest.mark.parametrize("blocks", [0, 1])
def test_draws_agree_below_and_run_those_blocks_once(make_causal, blocks):
    adapter = make_causal()  # q_proj and v_proj of two blocks, and lm_head
    guide = make_guide(ScalaBLModel(adapter, num_data=3), "top_normal", blocks=blocks)
    draws = draw(guide, 6, seed=0)
    differs = (draws != draws[:1]).any(-1).any(0)
    assert differs.tolist() == [False] * (4 - 2 * blocks) + [True] * (2 * blocks + 1)
    assert adapter.trunk.depth_for(draws) == 2 - blocks
    assert guide.sample(2).shape == (2, *adapter.shape)
    pair = draw(guide, 2, seed=0, kind="antithetic")
    torch.testing.assert_close(pair.mean(0), guide.median()["s"])
    assert draw(guide, 4, seed=0, kind="sobol").shape == (4, *adapter.shape)
    M, r = adapter.shape
    assert sum(p.numel() for p in guide.parameters()) == M * r + (2 * blocks + 1) * r


def test_quantiles_and_kl_are_those_of_normals_above_and_of_points_below(make_causal):
    """Also where the points have moved, and no two modules have one prior."""
    adapter = make_causal(targets=("q_proj", "v_proj"))
    M, r = adapter.shape
    guide = make_guide(ScalaBLModel(adapter, num_data=3), "top_normal", blocks=1)
    guide.loc = torch.randn(M, r)
    guide.scale = torch.rand(M // 2, r) + 0.1
    q = {"loc": guide.loc[M // 2 :].detach().numpy(), "scale": guide.scale.detach().numpy()}
    levels = [0.1, 0.5, 0.9]
    for level, found in zip(levels, guide.quantiles(levels)["s"].numpy(), strict=True):
        np.testing.assert_array_equal(found[: M // 2], guide.loc[: M // 2].detach().numpy())
        expected = stats.norm.ppf(level, **q)
        np.testing.assert_allclose(found[M // 2 :], expected, rtol=1e-5, atol=1e-6)
    p_loc, p_scale = torch.randn(M, r), torch.arange(1.0, M + 1)[:, None].expand(M, r)
    kl = 0.0
    for m in range(M // 2):
        for j in range(r):
            a, b = q["loc"][m, j], q["scale"][m, j]
            c, d = float(p_loc[M // 2 + m, j]), float(p_scale[M // 2 + m, j])
            kl += math.log(d / b) + (b**2 + (a - c) ** 2) / (2 * d**2) - 0.5
    assert guide.kl(dist.Normal(p_loc, p_scale).to_event(2)) == pytest.approx(kl, rel=1e-4)


def test_a_model_without_known_blocks_is_refused(tokenizer):
    llm = tiny_llama()
    llm.model.layers = nn.Sequential(*llm.model.layers)
    readout = LabelTokens(tokenizer, PROMPTS["letters"], "ABCD", max_length=64)
    model = ScalaBLModel(SubspaceAdapter(llm, lora("q_proj"), readout), num_data=3)
    for blocks in (0, 1):
        with pytest.raises(ValueError, match=r"top_normal needs blocks: .*in no nn"):
            make_guide(model, "top_normal", blocks=blocks)


def test_bad_settings_are_refused(make_causal):
    model = ScalaBLModel(make_causal(targets=("q_proj",)), num_data=3)
    with pytest.raises(ValueError, match=r"blocks is 3: expected a whole number from 0 to 2"):
        make_guide(model, "top_normal", blocks=3)
    with pytest.raises(ValueError, match=r"no adapted module is that high: expected 1 or more"):
        make_guide(model, "top_normal", blocks=0)
