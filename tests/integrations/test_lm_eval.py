"""lm-evaluation-harness: the base model as its own ``hf`` has it, draws as plain PEFT has them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import lora, make_records, tiny_llama, write_jsonl
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from scalabl_pyro import FitConfig, Predictor, Record, SubspaceAdapter, load_run, predict
from scalabl_pyro.data import PROMPTS
from scalabl_pyro.lora.config import AdapterConfig, ModelConfig
from scalabl_pyro.readouts import LabelTokens
from scalabl_pyro.runs import PredictionConfig, export, make_predictor, train_run
from scalabl_pyro.runs.config import RunConfig
from scalabl_pyro.runs.data import DataConfig

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra harness: there is no lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from scalabl_pyro.integrations.lm_eval import ModelAverageLM  # noqa: E402

S = 3
STORIES = [
    ("Lily had a red ball. What did Lily have?", ("a ball", "a big dog", "the moon and the sun")),
    (
        "Tom was sad. His toy was",
        ("broken", "happy and he ate it", "in the sky", "a very good day"),
    ),
    ("The cat sat on the", ("mat", "bed and slept", "moon")),
    ("Once upon a time there was a little girl named", ("Lily", "Tom and Ben", "car")),
]
PAIRS = [
    ("Once upon a time", " there was a little girl."),
    ("Once upon a time ", "there was a little girl."),
    ("Once upon a time  ", " there"),
    ("", "Lily was happy."),
    ("<s>Tom had a", " ball"),
    ('She said "', 'no".'),
    ("The cat", "s sat"),
    ("One day. " * 300, "Lily saw a dog."),  # exceeds the context
]


def task_of(folder: Path, records: list[Record], **settings: object) -> dict:
    """A task of the harness, of questions in a file."""
    file = write_jsonl(folder / "questions.jsonl", records)
    files = {"data_files": {"test": str(file)}, "cache_dir": str(folder / "cache")}
    return {
        "task": "questions",
        "dataset_path": "json",
        "dataset_kwargs": files,
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": name} for name in ("acc", "acc_norm")],
        **settings,
    }


def evaluated(lm, task: dict) -> tuple[dict[str, float], list[list]]:
    """Metrics, and for each question what was answered."""
    evaluation = lm_eval.simple_evaluate(model=lm, tasks=[task], bootstrap_iters=0)
    metrics = {
        name.removesuffix(",none"): v for name, v in evaluation["results"]["questions"].items()
    }
    samples = sorted(evaluation["samples"]["questions"], key=lambda sample: sample["doc_id"])
    return metrics, [[answer for (answer,) in sample["resps"]] for sample in samples]


def ask(lm, kind: str, *arguments: tuple) -> list:
    requests = [Instance(kind, {}, args, n) for n, args in enumerate(arguments)]
    return getattr(lm, kind)(requests)


@pytest.fixture(scope="module")
def hf(shared):
    return HFLM(str(shared / "models" / "stories260k"), device="cpu", batch_size=3)


@pytest.fixture(scope="module")
def base(shared):
    """The same model with an untrained adapter, whose draws compute the same."""
    folder = shared / "models" / "stories260k"
    llm = AutoModelForCausalLM.from_pretrained(folder).eval()
    readout = LabelTokens(
        AutoTokenizer.from_pretrained(folder), PROMPTS["letters"], "ABCD", max_length=512
    )
    adapter = SubspaceAdapter(llm, lora("q_proj", "v_proj"), readout)
    return ModelAverageLM(Predictor(adapter, torch.randn(S, *adapter.shape)), batch_size=4)


def test_the_base_model_has_the_figures_of_hf_on_a_task(base, hf, tmp_path):
    records = [Record(str(n), *each, n % 3) for n, each in enumerate(STORIES)]
    task = task_of(tmp_path, records)
    (metrics, answers), (own, expected) = evaluated(base, task), evaluated(hf, task)
    for row, right in zip(answers, expected, strict=True):
        for (log_prob, greedy), (value, is_greedy) in zip(row, right, strict=True):
            assert log_prob == pytest.approx(value, abs=1e-4)
            assert greedy == is_greedy
    assert {name: metrics[name] for name in ("acc", "acc_norm")} == {
        name: own[name] for name in ("acc", "acc_norm")
    }


def test_pairs_become_the_tokens_of_hf(base, hf):
    """Spaces that end a context, no context, one with a special token, one that is too long."""
    with torch.no_grad():
        (text,) = ask(hf, "generate_until", ("Tom and Lily", {"max_gen_toks": 8, "until": []}))
    pairs = [*PAIRS, ("Tom and Lily", text if text[0] == " " else f" {text}")]
    ours, expected = ask(base, "loglikelihood", *pairs), ask(hf, "loglikelihood", *pairs)
    assert [log_prob for log_prob, _ in ours] == pytest.approx(
        [value for value, _ in expected], abs=1e-4
    )
    assert [greedy for _, greedy in ours] == [is_greedy for _, is_greedy in expected]
    assert {greedy for _, greedy in ours} == {True, False}


def test_whole_texts_have_the_likelihood_of_hf(base, hf):
    texts = [("Once upon a time there was a dog.",), ("One day, Lily saw a cat. " * 150,)]
    ours, expected = (ask(lm, "loglikelihood_rolling", *texts) for lm in (base, hf))
    assert ours == pytest.approx(expected, rel=1e-5)


def test_texts_end_where_those_of_hf_end(base, hf):
    asked = [
        ("Once upon a time", {"until": ["."], "max_gen_toks": 40}),
        ("Lily and Tom went to the park. They", {"until": ["\n", "ed"], "max_gen_toks": 40}),
        ("One day. " * 300, {"until": [], "max_gen_toks": 6}),
        ("Tom", {"until": [" "], "max_gen_toks": 6, "do_sample": False, "temperature": 0.0}),
        # What ends it stands in the prompt too, and must come again.
        ("Once upon a time, there was a", {"until": ["a l", "was"], "max_gen_toks": 12}),
    ]
    ours, expected = ask(base, "generate_until", *asked), ask(hf, "generate_until", *asked)
    assert ours == expected
    assert len(set(ours)) > 3


# ------------------------------------------------------------------ a trained run


@pytest.fixture
def run(tmp_path, tokenizer):
    """A run whose S draws differ, read by the likelihood of choices."""
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "model")
    tokenizer.add_special_tokens({"eos_token": "<eos>"})
    tokenizer.save_pretrained(tmp_path / "model")
    for split in ("train", "validation", "test"):
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", make_records(20 + len(split)))
    train_run(
        RunConfig(
            model=ModelConfig(str(tmp_path / "model"), device="cpu", readout="choice_likelihood"),
            lora=AdapterConfig(r=4, targets=("q_proj", "v_proj")),
            data=DataConfig(root=str(tmp_path / "data")),
            run_dir=str(tmp_path / "run"),
            method={"name": "scalabl", "draws": S, "guide": {"name": "normal", "init_scale": 0.5}},
            fit=FitConfig(steps=20, batch_size=8, lr=0.1),
            progress=False,
        )
    )
    return load_run(tmp_path / "run")


def plain_peft(folder: Path, out: Path) -> list[PeftModel]:
    """Each draw, as PEFT loads it."""
    return [
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), draw).eval()
        for draw in sorted(out.glob("draw_*"))
    ]


@torch.no_grad()
def by_hand(models, context: list[int], own: list[int]) -> tuple[float, bool]:
    """log of the mean of products, and whether each token is the first of Σ_k p_k(y_<t) p_k(·)."""
    rows = torch.tensor([[*context, *own]])
    each = torch.stack([m(rows).logits[0].double().softmax(-1) for m in models])
    read, greedy = torch.ones(len(models), dtype=torch.float64), True
    for t, token in enumerate(own, start=len(context) - 1):
        greedy &= int((read[:, None] * each[:, t]).sum(0).argmax()) == token
        read = read * each[:, t, token]
    return math.log(read.mean()), greedy


def test_the_average_is_that_of_a_loop_over_plain_peft(run, tmp_path):
    export(run, tmp_path / "out")
    models = plain_peft(tmp_path / "model", tmp_path / "out")
    assert len(models) == S
    lm = ModelAverageLM(str(tmp_path / "run"), batch_size=2)
    pairs = [("the cat", " runs"), ("a red dog", " sleeps the tree ."), ("the", " A B C")]
    tokens = [[run.readout.tokenizer.encode(text) for text in pair] for pair in pairs]
    expected = [by_hand(models, *pair) for pair in tokens]
    answers = ask(lm, "loglikelihood", *pairs)
    assert [value for value, _ in answers] == pytest.approx([v for v, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in answers] == [greedy for _, greedy in expected]
    of_one = [by_hand(models[:1], *pair)[0] for pair in tokens]
    assert max(abs(a - b) for a, (b, _) in zip(of_one, expected, strict=True)) > 0.05
    (whole,) = ask(lm, "loglikelihood_rolling", (" ".join(["the cat sings a dog"] * 30),))
    ids = run.readout.tokenizer.encode(" ".join(["the cat sings a dog"] * 30))
    windows = [(0, 64), (64, 128), (128, 150)]
    draws = []
    for model in models:
        total = 0.0
        for first, last in windows:
            row = [run.readout.tokenizer.eos_token_id, *ids][max(0, last - 64) : last + 1]
            with torch.no_grad():
                log_probs = model(torch.tensor([row[:-1]])).logits[0].log_softmax(-1)
            own = log_probs.gather(-1, torch.tensor(row[1:])[:, None])[-(last - first) :]
            total += float(own.sum())
        draws.append(total)
    expected = float(torch.tensor(draws, dtype=torch.float64).logsumexp(0)) - math.log(S)
    assert whole == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(("normalise", "metric"), [("none", "acc"), ("characters", "acc_norm")])
def test_accuracies_are_those_of_evaluate_where_there_is_one_draw(run, normalise, metric, tmp_path):
    """Of one draw κ and the softmax change no order; of more, they are other averages."""
    mean = make_predictor(run, PredictionConfig(name="median"))
    run.readout.normalise = normalise
    records = make_records(40)
    predictions = predict(mean, records).logits[0].argmax(-1).tolist()
    metrics, answers = evaluated(ModelAverageLM(mean), task_of(tmp_path, records))
    log_probs = torch.tensor([[value for value, _ in row] for row in answers])
    sizes = torch.tensor([[len(choice) for choice in record.choices] for record in records])
    favourites = (log_probs / sizes if metric == "acc_norm" else log_probs).argmax(-1).tolist()
    assert favourites == predictions
    assert len(set(favourites)) > 1
    right = sum(p == r.label for p, r in zip(predictions, records, strict=True))
    assert metrics[metric] == pytest.approx(right / 40)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(batch_size=0), "batch_size is 0: expected a number, 1 or more"),
        (dict(batch_size="auto"), "batch_size is 'auto': expected a number"),
        (dict(draws=4), "draws is 4, but a predictor has its own"),
    ],
)
def test_settings_that_cannot_be_are_refused(base, settings, message):
    with pytest.raises(ValueError, match=message):
        ModelAverageLM(base.predictor, **settings)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            dict(num_beams=4),
            r"a task asks for \['num_beams'\] in generation_kwargs: expected until",
        ),
        (dict(max_gen_toks=512), "max_gen_toks is 512, which leaves no room for a prompt"),
    ],
)
def test_decodings_that_we_have_not_are_refused(base, asked, message):
    with pytest.raises(ValueError, match=message):
        ask(base, "generate_until", ("Tom", {"until": ["."], **asked}))


def test_models_and_tokenizers_that_the_harness_cannot_use_are_refused(make_choice, make_causal):
    with pytest.raises(ValueError, match="MultipleChoice, cannot continue a text"):
        ModelAverageLM(Predictor(make_choice()))
    with pytest.raises(ValueError, match="no token that begins or ends a text"):
        ModelAverageLM(Predictor(make_causal()))


def test_new_draws_are_made_of_a_run(run):
    draws, again = (ModelAverageLM(run, draws=5, seed=7).predictor.draws for _ in range(2))
    assert draws.shape[0] == 5
    assert torch.equal(draws, again)
    assert torch.equal(ModelAverageLM(run).predictor.draws, run.predictor.draws)


def test_sampled_texts_differ_and_are_fixed_by_the_seed(base):
    request = ("Once upon a time", {"max_gen_toks": 8, "do_sample": True, "temperature": 1.0})
    texts = ask(base, "generate_until", *[request] * 3)
    assert len(set(texts)) == 3
    assert ask(base, "generate_until", *[request] * 3) == texts
