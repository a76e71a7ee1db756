"""``scalabl doctor``: what works here and with a model, and how to mend what does not."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..data import PROMPTS, Record
from ..embedded import MODEL_HASH, model_hash, model_path
from ..files import check_writable
from ..lora.adapter import SubspaceAdapter
from ..lora.config import AdapterConfig, ModelConfig
from ..lora.dtypes import slow_on_cpu
from ..lora.loading import load_llm, load_readout
from ..readouts import READOUTS, Classes, LabelTokens
from ..runs import checks
from ..runs.checks import Candidate, Finding

__all__ = ["DoctorConfig", "examine"]

LIBRARIES = ("torch", "pyro-ppl", "transformers", "peft", "datasets", "accelerate", "arviz")


@dataclass(frozen=True, slots=True)
class DoctorConfig:
    """Settings of ``scalabl doctor``, described in configs/doctor.yaml.

    :param model: with an empty name, this machine alone is looked at.
    :param classes: of the questions that the model is tried on.
    """

    model: ModelConfig
    lora: AdapterConfig
    classes: int = 4

    def __post_init__(self) -> None:
        if not 2 <= self.classes <= len(COLOURS):
            raise ValueError(f"classes is {self.classes}: expected 2 to {len(COLOURS)}")


def examine(config: DoctorConfig) -> str:
    """A table of what was looked at.

    :raises RuntimeError: if what every command needs is broken, a check of the model is wrong or
        broken, or nothing could be tried with it, once the table is printed.
    """
    findings = {name: _look(check, FIXES.get(name)) for name, check in CHECKS.items()}
    table = _table(findings)
    broken = [name for name in BASICS if findings[name].state == "broken"]
    if broken:
        print(table)
        raise RuntimeError(f"{', '.join(broken)}: broken, see the table; no command will work")
    if not config.model.name:
        return table
    print(f"{table}\n\n{config.model.name}, {config.model.readout}, {config.model.dtype}")
    model = {}
    for name, finding in _examine_model(config):
        model[name] = finding
        print(_table({name: finding}), flush=True)
    bad = [name for name, finding in model.items() if finding.state in ("wrong", "broken")]
    if bad:
        raise RuntimeError(
            f"{', '.join(bad)}: not as it must be with {config.model.name}, see the table; choose"
            " other lora.targets, or leave alone what fails"
        )
    if model["build"].state == "refused":
        raise RuntimeError(
            f"build: refused with {config.model.name}, for the reason in the table, and nothing"
            " else was tried: mend what it names, and try again"
        )
    refused = [name for name, finding in model.items() if finding.state == "refused"]
    if refused:
        return f"\nrefused, for the reasons in the table: {', '.join(refused)}; the rest works"
    return "\nall of it works"


def _table(findings: dict[str, Finding]) -> str:
    return "\n".join(f"{state:8s}{name:16s}{text}" for name, (state, text) in findings.items())


#: made up, of different lengths; nobody asks for the answers
QUESTIONS = (
    "Which one is the colour of grass?",
    "Grass?",
    "It fell all night, and in the morning the roofs were covered. Which colour had they?",
    "Which colour has the sky on a clear day in summer?",
    "And the sun?",
)
COLOURS = ("red", "blue", "green", "white", "black", "brown", "yellow", "orange")


def _choices(config: DoctorConfig) -> tuple[str, ...]:
    """Colours; where the answers are to be single tokens, and some colours are not, other words of
    the tokenizer's after those that are."""
    model, colours = config.model, COLOURS[: config.classes]
    kind = READOUTS[model.readout]
    if not issubclass(kind, LabelTokens) or PROMPTS[model.prompt].letters:
        return colours
    # This readout takes the same prompts, and words of any length.
    of_any_length = replace(model, readout="choice_likelihood")
    tokenizer = load_readout(of_any_length, Classes(len(colours), colours)).tokenizer
    decoded = (str(tokenizer.decode([i])).strip() for i in range(len(tokenizer)))
    words = (word for word in decoded if len(word) > 2 and word.isascii() and word.isalpha())
    chosen: tuple[str, ...] = ()
    for word in chain(COLOURS, words):
        if len(chosen) == config.classes:
            break
        longer = Classes(len(chosen) + 1, (*chosen, word))
        try:
            kind.build(tokenizer, longer, model, max_length=1)
        except ValueError:  # not one token, or the same as another word
            continue
        chosen = longer.words
    # With too few, the readout says of the colours what is wrong.
    return chosen if len(chosen) == config.classes else colours


def _examine_model(config: DoctorConfig) -> Iterator[tuple[str, Finding]]:
    try:
        choices = _choices(config)
        records = [
            Record(str(n), question, choices, n % len(choices))
            for n, question in enumerate(QUESTIONS)
        ]
        lora = config.lora.lora()
        readout = load_readout(config.model, config.model.classes(records))
        split = readout.encode(records)
    except (ValueError, OSError) as error:
        yield "build", Finding("refused", " ".join(str(error).split()))
        return

    def load() -> PreTrainedModel:
        torch.manual_seed(0)  # of a head that the checkpoint lacks
        return load_llm(config.model, readout, heads=lora.modules_to_save or ())

    def adapt(llm: PreTrainedModel, *, upper: bool = False, **options: Any) -> SubspaceAdapter:
        settings = config.lora
        blocks = getattr(llm.config.get_text_config(), "num_hidden_layers", 0)
        if (
            upper
            and isinstance(settings.targets, tuple)
            and not (settings.layers or settings.start)
        ):
            upper_half = tuple(range(blocks // 2, blocks))
            settings = replace(settings, layers=upper_half)
        torch.manual_seed(0)
        return SubspaceAdapter(llm, settings.lora(), readout, start=settings.start, **options)

    yield from checks.examine(Candidate(load, adapt, split, QUESTIONS[:2]))


def _look(check: Callable[[], Finding], fix: str | None) -> Finding:
    """Whatever goes wrong in a check is what it found."""
    try:
        return check()
    except Exception as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return Finding("broken", text if fix is None else f"{text}: {fix}")


def _versions() -> Finding:
    names = ("scalabl_pyro", *LIBRARIES)
    versions = [f"python {platform.python_version()}", *(f"{n} {version(n)}" for n in names)]
    return Finding("ok", ", ".join(versions))


def _cpu() -> Finding:
    capability = torch.backends.cpu.get_cpu_capability()
    threads = f"{os.cpu_count()} cores, torch takes {torch.get_num_threads()} threads, {capability}"
    slow = [name for name in ("bfloat16", "float16") if slow_on_cpu(getattr(torch, name))]
    if slow:
        threads += f"; no instructions for {' and '.join(slow)}, which are slow here"
    return Finding("ok", threads)


def _cuda() -> Finding:
    if torch.version.cuda is None and torch.version.hip is None:
        return Finding(
            "absent",
            f"torch {torch.__version__} is built for CPUs: on a machine with a GPU, install another"
            " build, see pytorch.org/get-started",
        )
    if not torch.cuda.is_available():
        return Finding(
            "absent", "torch sees no GPU: if there is one, see whether nvidia-smi lists it"
        )
    bfloat16 = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16: set float16"
    devices = []
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        name = torch.cuda.get_device_name(i)
        devices.append(f"{name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free")
    return Finding("ok", f"{'; '.join(devices)}; {bfloat16}")


def _bitsandbytes() -> Finding:
    """A linear layer in 4 bits, against the product with its weight."""
    if find_spec("bitsandbytes") is None:
        return Finding(
            "absent",
            "for model.quantization: pip install 'scalabl_pyro[quantization]'",
        )
    bnb = import_module("bitsandbytes")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4")
    layer.support_avx512bf16_for_cpu = False  # as models are loaded
    weight, x = layer.weight.detach().clone(), torch.eye(64)
    with torch.no_grad():
        error = (layer.to(device)(x.to(device)).cpu() - x @ weight.T).abs().max()
    if not error < 0.2 * weight.abs().max():
        return Finding(
            "broken", f"a layer in 4 bits is off by {error:.2g}: leave quantization null"
        )
    return Finding("ok", f"{version('bitsandbytes')}, a layer in 4 bits runs on {device}")


def _hub() -> Finding:
    cache = Path(constants.HF_HUB_CACHE)
    if constants.HF_HUB_OFFLINE:
        return Finding(
            "absent", f"offline, as HF_HUB_OFFLINE is set: models come from {cache} or a folder"
        )
    try:
        check_writable(cache / "model")
    except OSError:
        return Finding(
            "broken", f"nothing can be written to {cache}: set HF_HOME to another folder"
        )
    return Finding("ok", f"online, downloads go to {cache}")


def _embedded() -> Finding:
    path = model_path()
    if model_hash() != MODEL_HASH:
        return Finding("broken", f"{path} is not as it was shipped: install scalabl_pyro again")
    llm, tokenizer = (c.from_pretrained(path) for c in (AutoModelForCausalLM, AutoTokenizer))
    with torch.no_grad():
        logits = llm(**tokenizer("the", return_tensors="pt")).logits
    if not logits.isfinite().all():
        return Finding("broken", "its logits are not finite: install another build of torch")
    return Finding("ok", f"loads and runs, {llm.num_parameters():,} parameters")


CHECKS = {
    "versions": _versions,
    "CPU": _cpu,
    "CUDA": _cuda,
    "bitsandbytes": _bitsandbytes,
    "Hub": _hub,
    "embedded model": _embedded,
}
#: what to do where a check fails with an error
FIXES = {
    "versions": "install scalabl_pyro again",
    "CUDA": "see whether nvidia-smi lists the GPU, and whether its driver fits torch",
    "bitsandbytes": "leave model.quantization null, or install bitsandbytes again",
    "embedded model": "install scalabl_pyro again",
}
#: what every command needs
BASICS = ("versions", "CPU", "embedded model")
