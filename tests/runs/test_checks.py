"""The checks of a model find the faults that they are for, and no others, in every dtype."""

from __future__ import annotations

import pytest
import torch
from conftest import lora, make_records, tiny_bert_config, tiny_llama
from transformers import BertForMultipleChoice

from scalabl_pyro import SubspaceAdapter
from scalabl_pyro.data import PROMPTS
from scalabl_pyro.lora.checkpointing import Checkpointing
from scalabl_pyro.lora.hooks import Hooks
from scalabl_pyro.readouts import LabelTokens, MultipleChoice
from scalabl_pyro.readouts.choice_likelihood import ChoiceLikelihood
from scalabl_pyro.readouts.completion_tokens import CompletionTokens
from scalabl_pyro.runs import checks
from scalabl_pyro.runs.checks import Candidate, examine

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def make_candidate(tokenizer):
    def make(dtype=torch.float32, targets=("q_proj", "v_proj", "lm_head"), *, upper=True):
        readout = LabelTokens(tokenizer, PROMPTS["letters"], "ABCD", max_length=64)

        def adapt(llm, *, upper=False, **options):
            layers = {"layers_to_transform": [1]} if upper else {}
            names = [name for name in targets if not (upper and name == "lm_head")]
            torch.manual_seed(0)
            return SubspaceAdapter(llm, lora(*names, **layers), readout, **options)

        split = readout.encode(make_records(5))
        prompts = ("the cat runs", "a dog")
        return Candidate(lambda: tiny_llama().to(dtype), adapt, split, prompts)

    return make


def states(candidate):
    return {name: finding.state for name, finding in examine(candidate)}


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_plain_llama_passes_all(make_candidate, dtype):
    findings = dict(examine(make_candidate(dtype)))
    assert list(findings) == ["build", *checks.CHECKS]
    assert {name: f for name, f in findings.items() if f.state != "ok"} == {}
    assert "1 of 2 blocks run once" in findings["shared trunk"].text


def test_what_a_model_lacks_is_absent_not_wrong(tokenizer):
    readout = MultipleChoice(tokenizer, num_classes=4, max_length=64)

    def load():
        torch.manual_seed(1)
        return BertForMultipleChoice(tiny_bert_config()).eval()

    def adapt(llm, *, upper=False, **options):
        torch.manual_seed(0)
        return SubspaceAdapter(
            llm, lora("query", "value", modules_to_save=["classifier"]), readout, **options
        )

    by_check = states(Candidate(load, adapt, readout.encode(make_records(5))))
    assert by_check.pop("generation") == by_check.pop("shared trunk") == "absent"
    assert set(by_check.values()) == {"ok"}


def on_tiny_llama(readout, **sizes) -> Candidate:
    def adapt(llm, *, upper=False, **options):
        layers = {"layers_to_transform": [1]} if upper else {}
        torch.manual_seed(0)
        return SubspaceAdapter(llm, lora("q_proj", "v_proj", **layers), readout, **options)

    split = readout.encode(make_records(5))
    return Candidate(lambda: tiny_llama(**sizes), adapt, split, ("the cat runs", "a dog"))


def test_prompts_are_read_again_in_the_chat_template(chat_tokenizer, monkeypatch):
    readout = ChoiceLikelihood(
        chat_tokenizer, PROMPTS["question"], num_classes=4, max_length=64, chat=True
    )
    candidate = on_tiny_llama(readout)
    by_check = states(candidate)
    assert set(by_check.values()) == {"ok"}, by_check
    bare = [chat_tokenizer(prompt).input_ids for prompt in candidate.prompts]
    monkeypatch.setattr(checks, "encode_prompts", lambda *args: bare)
    assert checks._outcome(checks.generates, candidate).state == "wrong"


def test_completions_of_different_lengths_are_compared_token_by_token(chat_tokenizer):
    readout = CompletionTokens(chat_tokenizer, num_classes=32, max_length=64)
    candidate = on_tiny_llama(readout)
    lengths = [sum(example.rows["completion_mask"][0]) for example in candidate.split]
    assert len(set(lengths)) > 1
    by_check = states(candidate)
    assert set(by_check.values()) == {"ok"}, by_check
    # What is compared are a row's last tokens, as many as its own completion has.
    logits = torch.randn(len(lengths), max(lengths), 32)
    by_hand = torch.cat([row[-length:] for row, length in zip(logits, lengths, strict=True)])
    assert checks._counted(candidate.batch, logits).equal(by_hand)
    collate = candidate.split.collate

    def with_padding_read(examples):
        batch = collate(examples)
        batch.inputs["attention_mask"].fill_(1)
        return batch

    candidate.split.collate = with_padding_read
    assert checks._outcome(checks.padded, candidate).state == "absent"


def test_a_refusal_is_told_with_its_reason(make_candidate):
    findings = dict(examine(make_candidate(targets=("q_proj", "nowhere"))))
    assert list(findings) == ["build"]
    assert findings["build"].state == "refused"
    assert "['nowhere'] match no module of LlamaForCausalLM" in findings["build"].text


# ---------------------------------------------------------------------- faults


def draws_swapped(patch):
    """With several draws, each has the s of the one before."""
    bind = Hooks.bind

    def another(self, s):
        return bind(self, s.roll(1, 0) if s is not None and s.dim() == 3 else s)

    patch.setattr(Hooks, "bind", another)


def s_left_out_of_exports(patch):
    save = checks.save_adapter
    patch.setattr(
        checks, "save_adapter", lambda adapter, s, folder: save(adapter, torch.ones_like(s), folder)
    )


def not_saved(patch):
    load = checks.load_file
    patch.setattr(checks, "load_file", lambda path: {n: 0 * v for n, v in load(path).items()})


def another_scale(patch):
    """ΔW twice as large as PEFT's."""
    scale = Hooks._scale

    def twice(self, index, module, args, output):
        return 2 * scale(self, index, module, args, output)

    patch.setattr(Hooks, "_scale", twice)


def nothing_trained(patch):
    patch.setattr(checks, "fit", lambda *args, **options: None)


def recomputed_with_another_s(patch):
    def contexts(self):
        bound = self._hooks.bound
        twice = bound._replace(s=tuple(2 * s for s in bound.s))
        return self._hooks.rebound(twice), self._hooks.rebound(twice)

    patch.setattr(Checkpointing, "_contexts", contexts)


def another_prompt(patch):
    encode = checks.encode_prompts

    def with_a_word_before(predictor, prompts, decoding):
        return encode(predictor, ["red " + prompt for prompt in prompts], decoding)

    patch.setattr(checks, "encode_prompts", with_a_word_before)


FAULTS = {
    "plain PEFT": another_scale,
    "draws at once": draws_swapped,
    "exported draw": s_left_out_of_exports,
    "run folder": not_saved,
    "training": nothing_trained,
    "checkpointing": recomputed_with_another_s,
    "generation": another_prompt,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(make_candidate, monkeypatch, name, dtype):
    candidate = make_candidate(dtype)
    candidate.settle()
    FAULTS[name](monkeypatch)
    finding = checks._outcome(checks.CHECKS[name], candidate)
    assert finding.state == "wrong", finding.text


def test_padding_that_a_model_itself_reads_is_told_apart(make_candidate, monkeypatch):
    """A model whose logits depend on padding, with LoRA or without."""
    candidate = make_candidate()
    candidate.settle()

    def reads_padding(llm):
        forward = llm.forward

        def wrapped(input_ids, attention_mask=None, **options):
            out = forward(input_ids, attention_mask=attention_mask, **options)
            out.logits = out.logits + input_ids.shape[1] * torch.arange(out.logits.shape[-1])
            return out

        llm.forward = wrapped
        return llm

    load = candidate.load
    candidate.load = lambda: reads_padding(load())
    finding = checks._outcome(checks.CHECKS["padded rows"], candidate)
    assert finding.state == "absent"
    assert "the model's own logits" in finding.text
