from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import fill_lora_B, lora, tiny_llama
from omegaconf import OmegaConf
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForCausalLM,
)

import scalabl_pyro.commands.generate as command
from scalabl_pyro import Predictor, SubspaceAdapter
from scalabl_pyro.commands._jsonl import ResumableJsonl
from scalabl_pyro.commands.generate import GenerateConfig, generate_file
from scalabl_pyro.data import PROMPTS, DataError, read_completions
from scalabl_pyro.prediction import Decoding, generate, score
from scalabl_pyro.readouts import LabelTokens
from scalabl_pyro.runs.settings import ConfigError, build

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["the cat", "a bird sings the red tree", "green", "the dog sleeps . Answer : A"]
ENDS = [8, 13]
GREEDY = Decoding(12)
SAMPLED = Decoding(12, do_sample=True, temperature=1.3, top_k=9, top_p=0.95, seed=4)


def tiny_gpt2(vocabulary: int) -> GPT2LMHeadModel:
    torch.manual_seed(1)
    sizes = dict(vocab_size=vocabulary, n_positions=64, n_embd=16, n_layer=2, n_head=2)
    return GPT2LMHeadModel(
        GPT2Config(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    ).eval()


@pytest.fixture(params=["llama", "gpt2"])
def predictor(request, tokenizer):
    """Five draws that disagree, on a model in which frequent tokens end a text."""
    readout = LabelTokens(tokenizer, PROMPTS["letters"], "ABCD", max_length=64)
    if request.param == "llama":
        llm, targets = tiny_llama(vocab_size=len(tokenizer)), ("q_proj", "v_proj", "lm_head")
    else:
        llm, targets = tiny_gpt2(len(tokenizer)), ("lm_head",)
    llm.generation_config.eos_token_id = ENDS
    adapter = SubspaceAdapter(llm, lora(*targets), readout)
    fill_lora_B(adapter)
    return Predictor(adapter, adapter.init_loc + 2 * torch.randn(5, *adapter.shape))


def by_hand(predictor, prompt, ids):
    """(S, T, C) probabilities of the next token: each draw reads the whole text, alone."""
    context = predictor.adapter.readout.tokenizer(prompt).input_ids
    rows = torch.tensor([[*context, *ids.tolist()]])
    probs = []
    for s in predictor.draws:
        with predictor.adapter.bound(s[None]) as llm, torch.no_grad():
            logits = llm(rows).logits[0, len(context) - 1 : -1]
        probs.append(logits.softmax(-1))
    return torch.stack(probs)


def check_by_hand(predictor, prompt, text):
    each = by_hand(predictor, prompt, text.ids)
    mean = each.mean(0)
    picked = each.gather(-1, text.ids.expand(len(each), -1)[..., None])[..., 0]
    plogp = torch.special.entr(mean).sum(-1), torch.special.entr(each).sum(-1).mean(0)
    close = dict(atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(text.draw_log_probs, picked.log(), **close)
    torch.testing.assert_close(text.log_probs, picked.mean(0).log(), **close)
    torch.testing.assert_close(text.entropy, plogp[0], **close)
    torch.testing.assert_close(text.mutual_information, plogp[0] - plogp[1], **close)
    assert text.log_prob == pytest.approx(float(picked.mean(0).log().sum()), rel=1e-4)
    sums = picked.log().sum(-1)
    assert text.spread == pytest.approx(
        float((sums - sums.mean()).square().mean().sqrt()), rel=1e-3
    )
    assert text.token_mutual_information == pytest.approx(
        float(plogp[0].sub(plogp[1]).sum()), rel=1e-3
    )
    return each


@pytest.mark.parametrize("decoding", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_all_draws_read_the_same_tokens(predictor, decoding, monkeypatch):
    llm = predictor.adapter.peft_model.get_base_model()
    plain, rows = llm.generate, []
    monkeypatch.setattr(llm, "generate", lambda **kw: rows.append(plain(**kw)))
    texts = list(generate(predictor, TEXTS, decoding))
    by_draw = rows[0].unflatten(0, (5, len(TEXTS)))
    assert (by_draw == by_draw[0]).all()
    for row, text in zip(by_draw[0], texts, strict=True):
        assert torch.equal(row[7 : 7 + len(text.ids)], text.ids)
        assert (row[7 + len(text.ids) :] == 0).all()


def test_greedy_takes_the_most_probable_token_of_the_average(predictor):
    """Which no single draw takes throughout."""
    apart = 0
    for prompt, text in zip(TEXTS, generate(predictor, TEXTS, GREEDY), strict=True):
        each = by_hand(predictor, prompt, text.ids)
        assert torch.equal(each.mean(0).argmax(-1), text.ids)
        apart += int((each.argmax(-1) != text.ids).sum())
    assert apart > 10


@pytest.mark.parametrize("decoding", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_what_is_reported_is_what_each_draw_says_of_the_text_alone(predictor, decoding):
    # A temperature is one of the answers' logits, not of the next token's.
    predictor = Predictor(predictor.adapter, predictor.draws, temperature=1.4)
    for prompt, text in zip(TEXTS, generate(predictor, TEXTS, decoding), strict=True):
        check_by_hand(predictor, prompt, text)
        assert text.spread > 0.1
        assert text.token_mutual_information > 0.1


def test_sampled_tokens_are_among_the_top_k_of_the_average(predictor):
    decoding = Decoding(12, do_sample=True, top_k=3)
    ranks = []
    for prompt, text in zip(TEXTS, generate(predictor, TEXTS, decoding), strict=True):
        mean = by_hand(predictor, prompt, text.ids).mean(0)
        taken = mean.gather(-1, text.ids[:, None])
        ranks += (mean > taken).sum(-1).tolist()
    assert set(ranks) == {0, 1, 2}


def test_scores_of_given_texts(predictor):
    predictor = Predictor(predictor.adapter, predictor.draws, temperature=1.4)
    completions = ["runs", "sings a green dog .", "red blue", "tree"]
    texts = score(predictor, TEXTS, [f" {c}" for c in completions])
    for prompt, completion, text in zip(TEXTS, completions, texts, strict=True):
        assert list(text.tokens) == completion.split()
        check_by_hand(predictor, prompt, text)


def test_a_generated_text_is_scored_as_when_it_was_generated(predictor):
    # A text without special tokens, which decoding would leave out.
    decoding = Decoding(8, do_sample=True, temperature=0.3)
    texts = list(generate(predictor, TEXTS * 4, decoding))
    plain = [i for i, text in enumerate(texts) if text.ids.min() > 1]
    assert len(plain) > 4
    again = score(predictor, [(TEXTS * 4)[i] for i in plain], [texts[i].text for i in plain])
    for i, text in zip(plain, again, strict=True):
        assert torch.equal(text.ids, texts[i].ids)
        for name in ("draw_log_probs", "log_weights", "entropy", "mutual_information", "epkl"):
            torch.testing.assert_close(
                getattr(text, name), getattr(texts[i], name), atol=2e-5, rtol=1e-4
            )


def same(a, b):
    assert a.text == b.text
    assert torch.equal(a.ids, b.ids)
    torch.testing.assert_close(a.draw_log_probs, b.draw_log_probs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("decoding", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_prompts_do_not_touch_each_other(predictor, decoding):
    """Padding, end tokens and chunks: together, two at a time, and from the third on."""
    prompts = TEXTS * 3
    whole = list(generate(predictor, prompts, decoding))
    lengths = {len(text.ids) for text in whole}
    assert len(lengths) > 1, "some texts end before others"
    for text in whole:
        ends = [int(i) in ENDS for i in text.ids]
        assert not any(ends[:-1])
        assert ends[-1] or len(ends) == 12
    few = Predictor(predictor.adapter, predictor.draws, max_rows=10)
    for a, b in zip(whole, generate(few, prompts, decoding), strict=True):
        same(a, b)
    for a, b in zip(whole[2:], generate(predictor, prompts, decoding, start=2), strict=True):
        same(a, b)
    whole = list(generate(few, prompts, decoding))
    for start in (1, 2, 5):  # inside a chunk too, and then to the bit
        for a, b in zip(whole[start:], generate(few, prompts, decoding, start=start), strict=True):
            assert torch.equal(a.draw_log_probs, b.draw_log_probs)


def test_given_texts_run_so_many_at_once_as_are_few_logits(predictor, monkeypatch):
    completions = [" runs", " a green dog sleeps .", " sings the tree"]
    prompts = ["the cat", "a bird in the tree", "dog"]
    together = score(predictor, prompts, completions)
    sizes, bound = [], predictor.adapter.bound

    @contextmanager
    def watched(draws):
        with bound(draws) as llm:
            handle = llm.register_forward_pre_hook(
                lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
            )
            try:
                yield llm
            finally:
                handle.remove()

    monkeypatch.setattr(predictor.adapter, "bound", watched)
    monkeypatch.setattr("scalabl_pyro.prediction.texts.MOST_LOGITS", 1)
    for a, b in zip(together, score(predictor, prompts, completions), strict=True):
        same(a, b)
    assert sizes == [predictor.num_draws] * 3


def test_less_runs_at_once_where_memory_runs_out(predictor, monkeypatch, caplog):
    expected = list(generate(predictor, TEXTS, GREEDY))
    llm = predictor.adapter.peft_model.get_base_model()
    plain = llm.generate

    def small(**kwargs):
        if len(kwargs["input_ids"]) > 5:
            raise torch.OutOfMemoryError("out of memory")
        return plain(**kwargs)

    monkeypatch.setattr(llm, "generate", small)
    for a, b in zip(expected, generate(predictor, TEXTS, GREEDY), strict=True):
        same(a, b)
    assert [r.args for r in caplog.records] == [(5, 4, 2), (5, 2, 1)]
    predictor.draws = predictor.draws.repeat(2, 1, 1)
    with pytest.raises(torch.OutOfMemoryError):
        list(generate(predictor, TEXTS, GREEDY))


@pytest.mark.parametrize("decoding", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_texts_end_with_the_token_that_completes_a_stop(predictor, decoding):
    """The same texts cut by hand; what stands in a prompt ends nothing."""
    prompts = [*TEXTS, "the cat red"]
    tokenizer = predictor.adapter.readout.tokenizer
    whole = list(generate(predictor, prompts, decoding))
    longest = max(whole, key=lambda text: len(text.ids))
    assert len(longest.ids) > 6
    stops = ("the cat red", tokenizer.decode(longest.ids[3:5]))
    cut = 0
    stopped = generate(predictor, prompts, replace(decoding, stop=stops))
    for full, text in zip(whole, stopped, strict=True):
        T = len(full.ids)
        starts = (t for t in range(1, T) if any(s in tokenizer.decode(full.ids[:t]) for s in stops))
        length = next(starts, T)
        assert torch.equal(text.ids, full.ids[:length])
        torch.testing.assert_close(
            text.draw_log_probs, full.draw_log_probs[:, :length], atol=1e-5, rtol=1e-5
        )
        cut += length < T
        ended = int(text.ids[-1]) in ENDS or any(s in tokenizer.decode(text.ids) for s in stops)
        assert text.finish_reason == ("stop" if ended else "length")
    assert cut


def test_a_text_that_ran_out_of_tokens_says_so(predictor):
    whole = list(generate(predictor, TEXTS, GREEDY))
    length = max(len(text.ids) for text in whole) - 1
    short = list(generate(predictor, TEXTS, Decoding(length)))
    assert [t.finish_reason for t in short] == [
        "stop" if len(text.ids) <= length else "length" for text in whole
    ]
    assert {t.finish_reason for t in short} == {"stop", "length"}


def test_every_prompt_has_draws_of_its_own(predictor):
    texts = list(generate(predictor, ["the cat"] * 3, SAMPLED))
    assert len({text.text for text in texts}) == 3
    again = list(generate(predictor, ["the cat"] * 3, SAMPLED))
    assert [t.text for t in again] == [t.text for t in texts]


@pytest.mark.parametrize("decoding", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_posterior_collapsed_to_its_mean_is_plain_generate(predictor, decoding):
    """The plain model is PEFT's own LoRA, generating by transformers' own sampling."""
    adapter, tokenizer = predictor.adapter, predictor.adapter.readout.tokenizer
    mean = predictor.draws[0]
    collapsed = Predictor(adapter, mean.expand(4, -1, -1))
    texts = list(generate(collapsed, TEXTS, decoding))
    options = dict(max_new_tokens=12, do_sample=decoding.do_sample)
    if decoding.do_sample:
        options |= dict(temperature=1.3, top_k=9, top_p=0.95)
    for number, (prompt, text) in enumerate(zip(TEXTS, texts, strict=True)):
        inputs = tokenizer(prompt, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        torch.manual_seed(decoding.generator(number).initial_seed())
        with adapter.folded(mean) as peft, adapter.bound(None):
            plain = peft.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
        assert torch.equal(text.ids, plain)
        assert text.spread == pytest.approx(0, abs=1e-4)
        assert text.token_mutual_information == pytest.approx(0, abs=1e-4)


def test_a_point_estimate_generates_too(predictor):
    adapter = predictor.adapter
    one = Predictor(adapter, torch.ones(1, *adapter.shape))
    pairs = zip(
        generate(Predictor(adapter), TEXTS, GREEDY), generate(one, TEXTS, GREEDY), strict=True
    )
    for a, b in pairs:
        same(a, b)


def test_decoding_defaults_of_the_checkpoint_are_not_used(predictor):
    expected = list(generate(predictor, TEXTS, GREEDY))
    llm = predictor.adapter.peft_model.get_base_model()
    own = llm.generation_config
    own.repetition_penalty, own.suppress_tokens = 5.0, [3, 4, 5, 6]
    for a, b in zip(expected, generate(predictor, TEXTS, GREEDY), strict=True):
        same(a, b)
    assert llm.generation_config is own


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(temperature=0.3), "temperature is 0.3, .* act on sampled tokens alone: set do_sam"),
        (dict(top_k=5), "top_k is 5 .* act on sampled tokens alone"),
        (dict(top_p=0.9), "top_p is 0.9, which act on sampled tokens alone"),
        (dict(max_new_tokens=0), "max_new_tokens is 0"),
        (dict(temperature=0.0), "temperature is 0.0: .*do_sample=false"),
        (dict(top_k=-1), "top_k is -1"),
        (dict(top_p=0.0), "top_p is 0.0"),
        (dict(stop="."), r"stop is '\.': expected a list of texts"),
        (
            dict(stop=(".", "")),
            r"stop is \('\.', ''\): expected a list of texts that are not empty",
        ),
    ],
)
def test_bad_decodings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Decoding(**settings)


def test_bad_prompts_are_refused_before_any_work(predictor, monkeypatch):
    llm = predictor.adapter.peft_model.get_base_model()
    monkeypatch.setattr(llm, "forward", None)
    with pytest.raises(ValueError, match="prompt 1: prompt is ' '"):
        generate(predictor, ["the", " "], GREEDY)
    for words, new in ((64, 1), (70, 1), (60, 5)):
        with pytest.raises(ValueError, match=f"prompt 1, .* has {words} tokens, .* lower max_new"):
            generate(predictor, ["the", "cat " * words], Decoding(new))
    generate(predictor, ["cat " * 60], Decoding(4))  # fits, and starts with the first text


def test_models_that_cannot_generate_are_refused(make_choice, make_classifier):
    for make, name in ((make_choice, "MultipleChoice"), (make_classifier, "Classification")):
        with pytest.raises(ValueError, match=f"{name}, cannot continue a text"):
            generate(Predictor(make()), ["the"])
        with pytest.raises(ValueError, match=f"{name}, cannot continue a text"):
            score(Predictor(make()), ["the"], [" cat"])


def test_a_real_model(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories260k")
    llm = AutoModelForCausalLM.from_pretrained(shared / "models" / "stories260k").eval()
    readout = LabelTokens(tokenizer, PROMPTS["letters"], "ABCD", max_length=512)
    adapter = SubspaceAdapter(llm, lora("q_proj", "v_proj"), readout)
    fill_lora_B(adapter)
    with torch.no_grad():
        for B in adapter.state().values():
            B.mul_(0.05)
    predictor = Predictor(adapter, adapter.init_loc + torch.randn(4, *adapter.shape))
    prompt = "Once upon a time, there was a little"
    (text,) = generate(predictor, [prompt], Decoding(20))
    assert text.text[0] == " ", "the space behind the prompt stays"
    check_by_hand(predictor, prompt, text)


# -------------------------------------------------------------------- files


def rows(*ids):
    return [{"id": i, "text": f"ä {i}"} for i in ids]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_are_kept_over_a_crash_and_a_torn_one_is_written_again(tmp_path):
    path, part = tmp_path / "new" / "out.jsonl", tmp_path / "new" / "out.jsonl.part"

    def crash():
        with ResumableJsonl(path, "abcd", {}) as file:
            file.write(rows("a"))
            file.write(rows("b"))
            assert lines(part) == rows("a", "b"), "on the disk at once"
            raise RuntimeError("power")

    with pytest.raises(RuntimeError, match="power"):
        crash()
    assert not path.exists()
    with part.open("a") as torn:
        torn.write('{"id": "c", "te')
    with ResumableJsonl(path, "abcd", {}) as file:
        assert file.done == 2
        file.write(rows("c", "d"))
    assert lines(path) == rows("a", "b", "c", "d")
    assert [p.name for p in path.parent.iterdir()] == ["out.jsonl"]


def test_a_file_that_only_lacks_its_name_gets_it(tmp_path):
    path = tmp_path / "out.jsonl"

    def crash():
        with ResumableJsonl(path, "ab", {}) as file:
            file.write(rows("a", "b"))
            raise RuntimeError("power")

    with pytest.raises(RuntimeError, match="power"):
        crash()
    with ResumableJsonl(path, "ab", {}) as file:
        assert file.done == 2
    assert lines(path) == rows("a", "b")


def test_a_part_is_gone_on_with_only_for_the_same_work(tmp_path):
    path = tmp_path / "out.jsonl"
    with ResumableJsonl(path, "abc", {"seed": 0, "run": "x"}) as file:
        file.write(rows("a", "b"))
    assert not path.exists(), "a third is to come"
    with pytest.raises(ValueError, match="other settings: seed 0, now 1: go on with"):
        ResumableJsonl(path, "abc", {"seed": 1, "run": "x"}).__enter__()
    with pytest.raises(ValueError, match="line 2 answers 'b', but record 2 of the input is 'x'"):
        ResumableJsonl(path, "axc", {"seed": 0, "run": "x"}).__enter__()
    with pytest.raises(ValueError, match="line 2 answers 'b', but record 2 of the input is None"):
        ResumableJsonl(path, "a", {"seed": 0, "run": "x"}).__enter__()
    part = tmp_path / "out.jsonl.part"
    part.write_text("no json\n")
    with pytest.raises(ValueError, match="line 1 is not an object with an id"):
        ResumableJsonl(path, "abc", {"seed": 0, "run": "x"}).__enter__()
    path.write_text("")
    with pytest.raises(FileExistsError, match="choose another output"):
        ResumableJsonl(path, "abc", {}).__enter__()


def test_two_processes_do_not_write_one_file(tmp_path):
    path = tmp_path / "out.jsonl"
    with ResumableJsonl(path, "ab", {}) as file:
        file.write(rows("a"))
        with pytest.raises(RuntimeError, match="another process writes"):
            ResumableJsonl(path, "ab", {}).__enter__()
        file.write(rows("b"))
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_a_single_text_is_no_list_of_prompts(predictor):
    with pytest.raises(ValueError, match="prompts is the text 'what': expected a list"):
        generate(predictor, "what")


@pytest.fixture
def prompts_file(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text(
        "".join(json.dumps({"id": f"p{i}", "prompt": p}) + "\n" for i, p in enumerate(TEXTS))
    )
    return path


def test_a_file_of_prompts_resumes_after_a_crash(predictor, prompts_file, tmp_path, monkeypatch):
    predictor = Predictor(predictor.adapter, predictor.draws, max_rows=5)  # a prompt at a time
    monkeypatch.setattr(
        command,
        "load_run",
        lambda folder: SimpleNamespace(folder=tmp_path, subspace_predictor=lambda: predictor),
    )
    monkeypatch.setattr(command, "read_texts", lambda path, run, columns: read_completions(path))

    def config(name):
        path = str(tmp_path / name)
        return GenerateConfig("run", str(prompts_file), path, decoding=SAMPLED, progress=False)

    assert generate_file(config("whole.jsonl"))["records"] == 4

    llm = predictor.adapter.peft_model.get_base_model()
    plain, calls = llm.generate, []

    def crash(**kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("power")
        return plain(**kwargs)

    monkeypatch.setattr(llm, "generate", crash)
    with pytest.raises(RuntimeError, match="power"):
        generate_file(config("out.jsonl"))
    assert len(lines(tmp_path / "out.jsonl.part")) == 2
    generate_file(config("out.jsonl"))
    assert len(calls) == 3 + 2, "what is written is not generated again"
    written = lines(tmp_path / "out.jsonl")
    assert written == lines(tmp_path / "whole.jsonl")

    for row, text in zip(written, generate(predictor, TEXTS, SAMPLED), strict=True):
        assert row["completion"] == text.text
        assert [t["token"] for t in row["tokens"]] == list(text.tokens)
        for key, values in (
            ("probability", text.log_probs.exp()),
            ("entropy", text.entropy),
            ("mutual_information", text.mutual_information),
        ):
            assert [t[key] for t in row["tokens"]] == pytest.approx(values.tolist(), abs=1e-5)
        assert row["log_prob"] == pytest.approx(text.log_prob, abs=1e-4)
        assert row["spread"] == pytest.approx(text.spread, abs=1e-4)
        assert row["token_mutual_information"] == pytest.approx(
            text.token_mutual_information, abs=1e-4
        )


def test_a_refused_file_leaves_nothing_behind(predictor, prompts_file, tmp_path, monkeypatch):
    monkeypatch.setattr(
        command,
        "load_run",
        lambda folder: SimpleNamespace(folder=tmp_path, subspace_predictor=lambda: predictor),
    )
    monkeypatch.setattr(command, "read_texts", lambda path, run, columns: read_completions(path))
    prompts_file.write_text(json.dumps({"id": "p", "prompt": "cat " * 64}) + "\n")
    out = tmp_path / "out.jsonl"
    with pytest.raises(ValueError, match="exceeds the context of 64"):
        generate_file(GenerateConfig("run", str(prompts_file), str(out), progress=False))
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]
    with pytest.raises(DataError, match="no such file"):
        read_completions(tmp_path / "none.jsonl")


def test_the_configuration_holds_the_defaults():
    values = OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / "generate.yaml"))
    values.pop("defaults")
    values |= dict(run="a", input="b", output="c")
    assert build(GenerateConfig, values) == GenerateConfig("a", "b", "c")
    values["decoding"]["num_beams"] = 4
    with pytest.raises(ConfigError, match=r"there is no setting decoding\.num_beams"):
        build(GenerateConfig, values)


def test_a_model_that_generates_otherwise_than_it_reads_is_refused(tokenizer):
    """RoBERTa's positions begin behind its padding index; transformers' generate begins at 0."""
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    config = RobertaConfig(vocab_size=32, is_decoder=True, pad_token_id=0, **sizes)
    torch.manual_seed(0)
    llm = RobertaForCausalLM(config).eval()
    readout = LabelTokens(tokenizer, PROMPTS["letters"], "ABCD", max_length=64)
    adapter = SubspaceAdapter(llm, lora("query", "value"), readout)
    fill_lora_B(adapter)
    texts = generate(Predictor(adapter, torch.randn(2, *adapter.shape)), ["the cat"], GREEDY)
    with pytest.raises(ValueError, match=r"RobertaForCausalLM generates otherwise than it reads"):
        next(texts)
