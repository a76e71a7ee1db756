"""Small random models and made-up questions; real models and data where they are at hand."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import pyro
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from scalabl_pyro import Predictor, Record, ScalaBLModel, Split, SubspaceAdapter
from scalabl_pyro.commands.cli import main
from scalabl_pyro.data import PROMPTS
from scalabl_pyro.guides import AutoSubspace
from scalabl_pyro.prediction import Predictions
from scalabl_pyro.readouts import LabelTokens
from scalabl_pyro.readouts.choice_likelihood import ChoiceLikelihood
from scalabl_pyro.readouts.heads import MultipleChoice, SequenceClassification

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
#: a block of code in one of them, and its language
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
#: settings of a short training run
FAST = [
    "fit.steps=4",
    "fit.batch_size=4",
    "fit.lr_guide=0.3",
    "progress=false",
    "model.dtype=float32",
]
WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "bird",
    "runs",
    "sings",
    "sleeps",
    "red",
    "blue",
    "green",
    "tree",
]


#: with turns that end in a special token, and a line break behind it
CHAT = (
    "{% for m in messages %}"
    "{% if loop.index0 % 2 != (m.role == 'assistant') | int and m.role != 'system' %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<' + m.role + '>' + m.content + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
TURNS = [
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "runs"},
    {"role": "user", "content": "a red bird"},
    {"role": "assistant", "content": "sings the blue"},
]


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder is the test's own, for commands that write beside it."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    pyro.clear_param_store()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data and a real pretrained model."""
    if not SHARED.is_dir():
        pytest.skip(f"no folder {SHARED} with real models and data on this machine")
    return SHARED


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct: that of SCALABL_SMOLLM2, or beside the checkout."""
    folder = Path(os.environ.get("SCALABL_SMOLLM2", ROOT.parent / "models" / "smollm2"))
    if not folder.is_dir():
        pytest.skip(f"no folder {folder} (SCALABL_SMOLLM2) with SmolLM2-135M-Instruct")
    return folder


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; punctuation apart."""
    vocabulary = ["<pad>", "<unk>", *WORDS, "Answer", ":", ".", "A", "B", "C", "D"]
    model = models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", model_max_length=64
    )


@pytest.fixture
def chat_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """With a chat template, whose turns end in another token than texts."""
    special = ["<user>", "<assistant>", "<system>", "<end>", "<eos>"]
    tokenizer.add_special_tokens({"eos_token": "<eos>", "additional_special_tokens": special[:-1]})
    tokenizer.chat_template = CHAT
    return tokenizer


def tokens_of_the_last_turn(tokenizer, messages) -> tuple[list[int], list[int]]:
    """The whole conversation, and which of its tokens are the answer's, from the template alone."""
    whole = tokenizer.apply_chat_template(messages).input_ids
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True).input_ids
    end = whole.index(tokenizer.convert_tokens_to_ids("<end>"), len(prompt))
    mask = [0] * len(prompt) + [1] * (end + 1 - len(prompt))
    return whole[: end + 1], mask


def make_records(count: int, *, choices: int = 4, labelled: bool = True) -> list[Record]:
    """Questions of different lengths."""
    generator = torch.Generator().manual_seed(count)

    def words(n: int) -> str:
        return " ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (n,), generator=generator))

    return [
        Record(
            id=f"q{i}",
            question=words(2 + i % 5),
            choices=tuple(words(1 + j % 2) for j in range(choices)),
            label=i % choices if labelled else None,
        )
        for i in range(count)
    ]


@pytest.fixture
def records() -> list[Record]:
    return make_records(12)


def longer_and_longer(records: list[Record]) -> list[Record]:
    """The same with choices of one word, two words, and so on, from another end in each."""
    return [
        replace(
            record,
            choices=tuple(
                " ".join(
                    [*record.choices, *record.choices][c : c + 1 + (c + n) % len(record.choices)]
                )
                for c in range(len(record.choices))
            ),
        )
        for n, record in enumerate(records)
    ]


def tiny_llama(**overrides: object) -> LlamaForCausalLM:
    sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2)
    heads = dict(num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64)
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**(sizes | heads | overrides), pad_token_id=0)).eval()


def tiny_bert_config(**overrides: object) -> BertConfig:
    sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2)
    heads = dict(num_attention_heads=2, max_position_embeddings=64)
    return BertConfig(**(sizes | heads | overrides))


def lora(*targets: str, r: int = 4, **options: object) -> LoraConfig:
    return LoraConfig(r=r, lora_alpha=8, target_modules=list(targets), **options)


def fill_lora_B(adapter: SubspaceAdapter) -> None:
    """Random B, without which nothing depends on s."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters().items():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def make_causal(tokenizer: PreTrainedTokenizerFast) -> Callable[..., SubspaceAdapter]:
    """Adapters on a tiny Llama read by label tokens, with a B that is not zero."""

    def make(*, filled: bool = True, targets=("q_proj", "v_proj", "lm_head"), **options):
        options = {"projections": "free"} | options
        readout = LabelTokens(tokenizer, PROMPTS["letters"], "ABCD", max_length=64)
        adapter = SubspaceAdapter(tiny_llama(), lora(*targets), readout, **options)
        if filled:
            fill_lora_B(adapter)
        return adapter

    return make


@pytest.fixture
def make_likelihood(tokenizer: PreTrainedTokenizerFast) -> Callable[..., SubspaceAdapter]:
    """Adapters on a tiny Llama, its output layer too, read by the likelihood of the choices."""

    def make(**options):
        options = {"projections": "free"} | options
        readout = ChoiceLikelihood(tokenizer, PROMPTS["question"], num_classes=4, max_length=64)
        adapter = SubspaceAdapter(
            tiny_llama(), lora("q_proj", "v_proj", "lm_head"), readout, **options
        )
        fill_lora_B(adapter)
        return adapter

    return make


@pytest.fixture
def make_choice(tokenizer: PreTrainedTokenizerFast) -> Callable[..., SubspaceAdapter]:
    """Adapters on a tiny BERT for multiple choice, with a trained head."""

    def make(**options):
        options = {"projections": "free"} | options
        torch.manual_seed(1)
        llm = BertForMultipleChoice(tiny_bert_config()).eval()
        readout = MultipleChoice(tokenizer, num_classes=4, max_length=64)
        config = lora("query", "value", modules_to_save=["classifier"])
        adapter = SubspaceAdapter(llm, config, readout, **options)
        fill_lora_B(adapter)
        return adapter

    return make


@pytest.fixture
def make_classifier(tokenizer: PreTrainedTokenizerFast) -> Callable[..., SubspaceAdapter]:
    """Adapters on a tiny BERT with a sequence classification head."""

    def make(**options):
        options = {"projections": "free"} | options
        torch.manual_seed(1)
        llm = BertForSequenceClassification(tiny_bert_config(num_labels=4)).eval()
        readout = SequenceClassification(tokenizer, num_classes=4, max_length=64)
        config = lora("query", "value", modules_to_save=["classifier"])
        adapter = SubspaceAdapter(llm, config, readout, **options)
        fill_lora_B(adapter)
        return adapter

    return make


@pytest.fixture(params=["make_causal", "make_choice", "make_classifier"])
def adapter(request: pytest.FixtureRequest) -> SubspaceAdapter:
    """An adapter with each readout."""
    return request.getfixturevalue(request.param)()


@pytest.fixture
def split(adapter: SubspaceAdapter, records: list[Record]) -> Split:
    return adapter.readout.encode(records)


@pytest.fixture
def model(adapter: SubspaceAdapter, split: Split) -> ScalaBLModel:
    return ScalaBLModel(adapter, num_data=len(split))


def predictions_of(folder: str | Path) -> dict[str, Predictions]:
    """Those that a run folder keeps, by split."""
    saved = load_file(Path(folder) / "predictions.safetensors")
    splits = [name.removesuffix(".logits") for name in saved if name.endswith(".logits")]
    return {n: Predictions(saved[f"{n}.logits"], saved[f"{n}.labels"]) for n in splits}


def whole(split: Split):
    """All examples of a split as one batch."""
    return split.collate(list(split))


def keeps_the_contract(guide: AutoSubspace, model: ScalaBLModel, *, init_scale: float) -> None:
    """What every guide over s gives: a density, draws, a median and quantiles that agree."""
    M, r = model.adapter.shape
    posterior = guide.get_posterior()
    assert posterior.event_shape == (M, r)
    torch.testing.assert_close(guide.median()["s"], model.init_loc)
    draws = guide.sample(4000)
    assert draws.shape == (4000, M, r)
    assert torch.isfinite(posterior.log_prob(draws)).all()
    torch.testing.assert_close(draws.mean(0), model.init_loc, atol=0.04, rtol=0)
    spread = (draws - draws.mean(0)).std()
    torch.testing.assert_close(spread, torch.tensor(init_scale), atol=0, rtol=0.1)
    low, median, high = guide.quantiles([0.1, 0.5, 0.9])["s"]
    assert (low < median).all()
    assert (median < high).all()
    for level, quantile in ((0.1, low), (0.5, median), (0.9, high)):
        assert float((draws < quantile).float().mean()) == pytest.approx(level, abs=0.02)


def write_jsonl(path: Path, records: list[Record]) -> Path:
    rows = [
        {"id": r.id, "question": r.question, "choices": r.choices, "label": r.label}
        for r in records
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def hub_copy(
    folder: Path, splits: dict[str, list[dict]], name: str = "default", **types: object
) -> Path:
    """A folder as the download of a data set of the Hub lays it out.

    :param types: of columns, where they are not to be inferred.
    """
    files = ""
    for split, rows in splits.items():
        table = datasets.Dataset.from_list(rows)
        for column, feature in types.items():
            table = table.cast_column(column, feature)
        place = folder / name / f"{split}-00000-of-00001.parquet"
        place.parent.mkdir(parents=True, exist_ok=True)
        table.to_parquet(place)
        files += f"  - split: {split}\n    path: {name}/{split}-*\n"
    head = f"---\nconfigs:\n- config_name: {name}\n  data_files:\n{files}---\n"
    (folder / "README.md").write_text(head)
    return folder


@pytest.fixture
def local_model(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A model folder in Hugging Face format."""
    folder = tmp_path / "model"
    tiny_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def scalabl(*words: object) -> int:
    """Run a command in this process; its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["scalabl", *map(str, words)])
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
    return 0


def blocks(path: Path, language: str) -> list[str]:
    """The blocks of code in a document."""
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), flags=re.DOTALL)


def run_snippet(start: str, names: dict[str, object]) -> None:
    """Run the block of CONTRIBUTING that begins so, among the names of the file it is meant for."""
    (code,) = [b for b in blocks(ROOT / "CONTRIBUTING.md", "python") if b.startswith(start)]
    exec(compile(code, "CONTRIBUTING.md", "exec"), names)


@pytest.fixture
def predictor(tokenizer) -> Predictor:
    """Draws that disagree, on a causal model in which frequent tokens end a text."""
    readout = LabelTokens(tokenizer, PROMPTS["letters"], "ABCD", max_length=64)
    llm = tiny_llama(vocab_size=len(tokenizer))
    llm.generation_config.eos_token_id = [8, 13]
    adapter = SubspaceAdapter(llm, lora("q_proj", "v_proj", "lm_head"), readout)
    fill_lora_B(adapter)
    return Predictor(adapter, adapter.init_loc + 2 * torch.randn(5, *adapter.shape))


@pytest.fixture
def data(tmp_path):
    """A folder of made-up questions for the command line."""
    for name, count in (("train", 16), ("validation", 8), ("test", 9)):
        write_jsonl(tmp_path / "data" / f"{name}.jsonl", make_records(count))
    return tmp_path / "data"


@pytest.fixture
def run(local_model, data, tmp_path, capsys):
    """A finished run folder."""
    where = [f"model.name={local_model}", f"data.root={data}", f"run_dir={tmp_path / 'run'}"]
    assert scalabl("train", *where, *FAST, "fit.lr=0.1") == 0
    capsys.readouterr()
    return tmp_path / "run"


def only_line(capsys) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line
