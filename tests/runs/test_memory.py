"""Estimates of memory agree with what the allocator hands out, where it can be watched."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import accumulate, count
from pathlib import Path

import bitsandbytes
import pytest
import torch
import transformers
from conftest import tiny_bert_config, tiny_llama
from omegaconf import OmegaConf
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, RobertaConfig

from benchmarks.cost._qwen import SIZES, qwen_config
from scalabl_pyro import Predictor, SubspaceAdapter
from scalabl_pyro.data import Batch
from scalabl_pyro.lora.config import AdapterConfig, ModelConfig
from scalabl_pyro.lora.loading import Classes, load_readout, load_skeleton, make_adapter
from scalabl_pyro.prediction.texts import MOST_LOGITS
from scalabl_pyro.readouts import READOUTS
from scalabl_pyro.runs.memory import MemoryConfig, estimate, explain_out_of_memory
from scalabl_pyro.runs.settings import build

ROOT = Path(__file__).resolve().parents[2]
LETTERS = Classes(4, ("A", "B", "C", "D"))


@pytest.fixture
def folder(tmp_path, tokenizer) -> Path:
    sizes = dict(hidden_size=128, intermediate_size=512, num_attention_heads=4)
    tiny_llama(**sizes, vocab_size=512, max_position_embeddings=512).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def settings(folder: Path, lora: dict | None = None, **model: object) -> MemoryConfig:
    options = dict(lora or {})
    projections, perp = options.pop("projections", "free"), options.pop("perp", 0)
    particles = options.pop("particles", 1)
    adapter = AdapterConfig(r=4, targets=("q_proj", "v_proj", "lm_head"), **options)
    return MemoryConfig(
        ModelConfig(str(folder), device="cpu", **model),
        adapter,
        projections,
        perp,
        batch_size=4,
        eval_batch_size=2,
        tokens=96,
        draws=5,
        particles=particles,
    )


def load(config: MemoryConfig):
    readout = load_readout(config.model, LETTERS)
    form = {"projections": config.projections, "perp": config.perp}
    return make_adapter(config.model, config.lora, readout, svd=False, **form)


def batch_of(config: MemoryConfig, size: int) -> Batch:
    ids = torch.ones(size, config.tokens, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return Batch(inputs, torch.ones(size, config.classes, dtype=torch.bool))


def allocated(run) -> int:
    """The most bytes that the allocator had given out at once during ``run``."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        run()
    events = watched.profiler.kineto_results.events()
    return max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


def most_in_training(adapter: SubspaceAdapter, config: MemoryConfig) -> int:
    def step():
        s = torch.ones(
            *((config.particles,) if config.particles > 1 else ()),
            len(adapter.layers),
            adapter.rank + adapter.perp,
            requires_grad=True,
        )
        adapter(batch_of(config, config.batch_size), s).log_softmax(-1)[..., 0].sum().backward()

    adapter.train()
    step()  # the first pass makes what stays
    adapter.peft_model.zero_grad(set_to_none=True)
    return allocated(step)


def held(model: nn.Module) -> int:
    """Bytes of parameters and buffers, with the scales of quantised layers."""
    scales = []
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            state = module.weight.quant_state
            scales += [state.absmax, state.state2.absmax]
        elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
            scales += [module.weight.SCB if module.state.SCB is None else module.state.SCB]
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers(), *scales))


CASES = {
    "plain": ({}, {}),
    "checkpointed": ({"gradient_checkpointing": True}, {}),
    "bfloat16": ({}, {"dtype": "bfloat16"}),
    "upper blocks": ({"layers": (1,)}, {}),
    "V frozen": ({"projections": "frozen_v"}, {}),
    "s alone": ({"projections": "fixed"}, {}),
    "s_perp": ({"projections": "frozen_v", "perp": 3}, {}),
    "particles": ({"particles": 3}, {}),
    "4bit": ({}, {"quantization": "4bit"}),
}


@pytest.mark.parametrize("case", CASES)
def test_estimates_are_within_15_percent_of_what_is_allocated(folder, case):
    config = settings(folder, CASES[case][0], **CASES[case][1])
    memory = estimate(config)
    adapter = load(config)
    model = adapter.peft_model
    assert memory.weights + memory.adapters == pytest.approx(held(model), rel=0.005)

    def predict():
        M, r = adapter.shape
        draws = torch.randn(config.draws, M, r + config.perp)
        Predictor(adapter, draws).logits(batch_of(config, config.eval_batch_size))

    assert memory.activations == pytest.approx(most_in_training(adapter, config), rel=0.15)
    adapter.eval()
    assert memory.prediction == pytest.approx(allocated(predict), rel=0.15)


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in READOUTS), ("choice_likelihood", {"normalise": "unconditional"})],
    ids=str,
)
def test_every_readout_is_estimated(folder, tmp_path, tokenizer, name, options):
    """Within 15 % of what the allocator hands out, and an error for want of memory is explained."""
    config = settings(folder, readout=name, **options)
    if READOUTS[name].auto_class != "AutoModelForCausalLM":
        tiny_bert_config(max_position_embeddings=512, hidden_size=128).save_pretrained(tmp_path)
        heads = AdapterConfig(r=4, targets=("query", "value"), heads=("classifier",))
        config = replace(config, model=replace(config.model, name=str(tmp_path)), lora=heads)
    memory = estimate(config)
    assert f"{config.tokens} tokens a row" in explain_out_of_memory(config)
    kind = READOUTS[name]
    readout = kind.untokenized(config.classes)
    llm = getattr(transformers, kind.auto_class).from_config(
        AutoConfig.from_pretrained(config.model.name, **readout.llm_options())
    )
    adapter = SubspaceAdapter(llm.eval(), config.lora.lora(), readout, projections="free")
    adapter.train()

    def rows(size: int) -> Batch:
        choices = (1, 1) if kind.reads_texts else (config.classes,)
        inputs = kind.blank_inputs(size, config.classes, config.tokens, config.model)
        return Batch(inputs, torch.ones(size, *choices, dtype=torch.bool))

    def step():
        s = torch.ones(adapter.shape, requires_grad=True)
        adapter(rows(config.batch_size), s).log_softmax(-1)[:, 0].sum().backward()

    step()  # the first pass makes what stays
    adapter.peft_model.zero_grad(set_to_none=True)
    assert memory.activations == pytest.approx(allocated(step), rel=0.15)
    adapter.eval()
    size = config.eval_batch_size
    if kind.reads_texts:
        each = config.tokens * config.draws * llm.config.vocab_size
        size = next(n for n in count(1) if n * each > MOST_LOGITS) - 1
    predictor = Predictor(adapter, torch.randn(config.draws, *adapter.shape))
    assert memory.prediction == pytest.approx(
        allocated(lambda: predictor.logits(rows(size))), rel=0.15
    )


def test_rows_of_s_perp_count_and_nothing_trains_them(folder):
    """k rows of V⊥ and k columns of B⊥ more in each module."""
    without, memory = (estimate(settings(folder, {"perp": k})) for k in (0, 3))
    adapter = load(settings(folder, {"perp": 3}))
    more = [A.weight for A in adapter.perp_A] + [B.weight for B in adapter.perp_B]
    assert memory.adapters - without.adapters == sum(weight.nbytes for weight in more) > 0
    assert memory.adapters == sum(value.nbytes for value in adapter.state().values())
    assert memory.optimizer == without.optimizer


def test_8_bit_layers_keep_their_inputs_for_the_backward_pass(folder):
    # In prediction, bitsandbytes' kernels for the CPU make more copies in passing than a GPU's.
    config = settings(folder, quantization="8bit")
    adapter = load(config)
    memory = estimate(config)
    assert memory.weights + memory.adapters == pytest.approx(held(adapter.peft_model), rel=0.005)
    assert memory.activations == pytest.approx(most_in_training(adapter, config), rel=0.15)
    assert memory.activations > 1.1 * estimate(settings(folder)).activations


def test_published_sizes_of_qwen(tmp_path):
    # Parameters of arXiv 2412.15115 in billions; two bytes each.
    published = {"0.5B": 0.494, "7B": 7.616, "32B": 32.764, "72B": 72.706}
    for size in SIZES:
        qwen_config(size).save_pretrained(tmp_path / size)
        config = ModelConfig(str(tmp_path / size), dtype="bfloat16")
        llm = load_skeleton(config, AutoModelForCausalLM)
        assert sum(p.numel() for p in llm.parameters()) / 1e9 == pytest.approx(
            published[size], rel=1e-3
        )


def test_a_folder_with_nothing_but_a_config_is_enough(folder, tmp_path):
    (tmp_path / "bare").mkdir()
    shutil.copy(folder / "config.json", tmp_path / "bare")
    config = settings(tmp_path / "bare")
    memory = estimate(config)
    assert memory == estimate(settings(folder))
    # Twice the rows, twice what they need, but for the gradients, which take what adapters take.
    more = estimate(replace(config, batch_size=8))
    assert more.activations - memory.adapters == pytest.approx(
        2 * (memory.activations - memory.adapters), rel=0.05
    )


def test_encoders_and_their_heads_are_estimated(tmp_path):
    tiny_bert_config().save_pretrained(tmp_path)
    by_readout = {}
    for readout in ("sequence_classification", "multiple_choice"):
        config = MemoryConfig(
            ModelConfig(str(tmp_path), readout=readout),
            AdapterConfig(r=4, targets=("query", "value"), heads=("classifier",)),
            batch_size=2,
            tokens=16,
        )
        by_readout[readout] = estimate(config)
    # A row for each of four choices instead of one.
    ratio = (
        by_readout["multiple_choice"].activations
        / by_readout["sequence_classification"].activations
    )
    assert 3 < ratio < 5


def test_out_of_memory_is_explained_with_what_helps(folder):
    config = settings(folder)
    text = explain_out_of_memory(config)
    for words in ("fit.batch_size=2", "lora.gradient_checkpointing=true", "quantization=4bit"):
        assert words in text
    helped = replace(config, lora=replace(config.lora, gradient_checkpointing=True))
    assert "gradient_checkpointing" not in explain_out_of_memory(helped)
    assert estimate(helped).training < estimate(config).training


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_loading_takes_beside_the_weights_is_the_file(tmp_path, stored, dtype):
    llm = tiny_llama(hidden_size=256, intermediate_size=512).to(stored)
    llm.save_pretrained(tmp_path)
    file = (tmp_path / "model.safetensors").stat().st_size
    memory = estimate(replace(settings(tmp_path, dtype=dtype), tokens=64))
    beside = 0 if stored == getattr(torch, dtype) else file
    assert memory.loading - memory.weights == pytest.approx(beside, rel=0.01)
    quantised = estimate(replace(settings(tmp_path, dtype=dtype, quantization="4bit"), tokens=64))
    assert quantised.loading - quantised.weights == pytest.approx(file, rel=0.01)


def test_defaults_of_the_command_are_those_of_the_class():
    config = OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / "memory.yaml"))
    del config["defaults"]
    config["model"]["name"] = "some/model"
    assert build(MemoryConfig, config) == MemoryConfig(ModelConfig("some/model"), AdapterConfig())


def test_bad_numbers_are_refused(folder):
    with pytest.raises(ValueError, match="tokens is 0: expected 1 or more"):
        replace(settings(folder), tokens=0)
    with pytest.raises(ValueError, match="perp is -1: expected 0 or more"):
        replace(settings(folder), perp=-1)


def test_more_tokens_than_the_model_has_positions_are_refused(folder, tmp_path):
    limit = AutoConfig.from_pretrained(folder).max_position_embeddings
    estimate(replace(settings(folder), tokens=limit, batch_size=1, eval_batch_size=1))
    with pytest.raises(
        ValueError, match=f"tokens is {limit + 1}, and .* has positions for {limit}"
    ):
        estimate(replace(settings(folder), tokens=limit + 1))
    # RoBERTa has one position more than its padding token's number that no token takes.
    config = RobertaConfig(max_position_embeddings=66, pad_token_id=1, num_hidden_layers=1)
    config.save_pretrained(tmp_path)
    roberta = replace(settings(tmp_path, readout="sequence_classification"), tokens=65)
    with pytest.raises(ValueError, match="positions for 64"):
        estimate(roberta)
