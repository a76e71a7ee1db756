"""Trained runs for other programs: each draw as an ordinary PEFT adapter, or one merged model.

An exported folder holds ``median/`` and ``draw_00/``, ``draw_01/``, … with A = diag(s)·V (or R·V)
and B, which any reader of PEFT adapters can load; ``manifest.json``, which says how to average
them; and ``README.md``, a model card.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from huggingface_hub import HfApi
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from ..embedded import model_folder
from ..files import whole_folder
from ..lora.adapter import SubspaceAdapter
from ..lora.config import ModelConfig
from ..lora.gguf import find_gguf
from ..lora.layers import ADAPTER, quiet_peft
from ..lora.loading import load_llm
from ..lora.saving import write_adapter
from ..readouts.base import Readout
from .card import Figure, about, head, plain, results, settings
from .folder import Run, point_of
from .reading import file_hash

__all__ = ["check_output_layer", "export", "merge", "push_to_hub"]

FORMAT = 1
OUTPUT_LAYER = ("keep", "drop", "merge")


def export(
    run: Run,
    folder: str | Path,
    *,
    draws: int | None = None,
    output_layer: str = "keep",
    metrics: Mapping[str, Mapping[str, Figure]] | None = None,
) -> dict[str, Any]:
    r"""Write the median and the draws as PEFT adapters of the run's own rank.

    .. math:: ΔW_m = (α/r) \, B_m A_m, \quad A_m = \mathrm{diag}(s_m) \, V_m

    With s_perp they have k more rows, and rank r + k.

    A server that adapts blocks but no output layer needs that layer's adapter out of the way:
    ``drop`` leaves it out of every adapter; ``merge`` also folds its median into ``base/``, a copy
    of the base model that the adapters then go with. Both change the logits, for no draw has an
    output layer of its own any more.

    :param folder: must not exist; written whole or not at all.
    :param draws: export the first so many of the run's S draws; all if left out.
    :param output_layer: ``keep``, ``drop`` or ``merge``.
    :param metrics: for the model card, as in ``metrics.json`` of a run, or with intervals.
    :returns: the manifest.
    :raises ValueError: if the run has fewer draws, or draws of more than s; if ``merge`` finds no
        adapted output layer; or if there are several adapters that train biases.
    :raises FileExistsError: if the folder exists.
    """
    check_output_layer(output_layer)
    predictor = run.subspace_predictor()
    adapter, draws_of_s = predictor.adapter, predictor.draws
    head = _output_layer(adapter)
    if output_layer == "merge" and head is None:
        raise ValueError("output_layer is 'merge', but no output layer is adapted: set it to keep")
    if output_layer != "keep" and set(adapter.layers) == {head}:
        raise ValueError(
            f"output_layer is {output_layer!r}, but nothing else is adapted, so that no adapter"
            " would be left: set it to keep"
        )
    points = {"median": point_of(run.predictor, run.guide)}
    available = 0 if draws_of_s is None else len(draws_of_s)
    if draws is not None and draws > available:
        raise ValueError(f"draws is {draws}, but the run has {available}: export at most those")
    for index in range(available if draws is None else draws):
        points[f"draw_{index:02d}"] = draws_of_s[index]  # type: ignore[index]
    bias = cast(LoraConfig, adapter.peft_model.peft_config[ADAPTER]).bias
    if bias != "none" and len(points) > 1:
        raise ValueError(
            f"the adapter trains biases (bias is {bias!r}), and PEFT holds one such adapter at a"
            " time: set draws=0, for the median alone, or make one adapter by scalabl distill"
        )
    drop = set() if output_layer == "keep" or head is None else {head}
    with whole_folder(Path(folder)) as part:
        for name, s in points.items():
            write_adapter(adapter, s, part / name, drop=drop)
        if output_layer == "merge":
            write_adapter(adapter, points["median"], part / "head", drop=set(adapter.layers) - drop)
            merge(run.config.model, run.readout, part / "head", part / "base")
            shutil.rmtree(part / "head")
        manifest = _manifest(run, part, list(points), output_layer)
        (part / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        (part / "README.md").write_text(_card(run, manifest, metrics or {}), encoding="utf-8")
    return manifest


def merge(
    config: ModelConfig,
    readout: Readout,
    adapter: str | Path,
    folder: str | Path,
) -> None:
    """Fold an exported adapter into its base model, and save that as a plain model with tokenizer.

    A quantised base is brought back to ``config.dtype`` first, with the values it computes with.
    Input and output embeddings that were tied are no longer, if the output layer was adapted.

    :param config: the base model, which is loaded anew.
    :param adapter: a PEFT adapter for it, such as ``median/``.
    :param folder: must not exist; written whole or not at all.
    :raises FileExistsError: if the folder exists.
    """
    with whole_folder(Path(folder)) as part:
        heads = PeftConfig.from_pretrained(str(adapter)).modules_to_save or ()
        llm = load_llm(config, readout, heads=heads)
        if hasattr(llm, "hf_quantizer"):
            llm = llm.dequantize()
        with quiet_peft():
            peft_model = PeftModel.from_pretrained(llm, str(adapter))
        _untie(llm)
        merged = peft_model.merge_and_unload(safe_merge=True)
        if "num_labels" in readout.llm_options() and readout.class_names:
            merged.config.id2label = dict(enumerate(readout.class_names))
            merged.config.label2id = {name: i for i, name in enumerate(readout.class_names)}
        merged.save_pretrained(part)
        readout.tokenizer.save_pretrained(part)


def push_to_hub(folder: str | Path, repo: str, *, private: bool = True) -> str:
    """Upload an exported folder to the Hub, with the token of ``hf auth login``.

    :param repo: ``user/name``; made if it does not exist.
    :returns: its address.
    :raises OSError: if the Hub cannot be reached or refuses; the folder stays as it is.
    """
    api = HfApi()
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=str(folder))
    except OSError as error:
        raise OSError(
            f"{folder} is complete, but was not uploaded: {error}; to try again, run hf upload"
            f" {repo} {folder}"
        ) from error
    return str(url)


# ---------------------------------------------------------------------- adapters


def _output_layer(adapter: SubspaceAdapter) -> str | None:
    """The name of the adapted output layer, where there is one."""
    head = adapter.llm.get_output_embeddings()
    return next((name for name, layer in adapter.layers.items() if layer is head), None)


def _untie(llm: PreTrainedModel) -> None:
    """Give an adapted output layer a weight of its own."""
    head = llm.get_output_embeddings()
    if isinstance(head, LoraLayer) and llm.config.get_text_config().tie_word_embeddings:
        base = cast(nn.Linear, head.get_base_layer())
        base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
        llm.config.tie_word_embeddings = False
        llm.config.get_text_config().tie_word_embeddings = False


# ---------------------------------------------------------------------- manifest, card


def _manifest(run: Run, folder: Path, names: list[str], output_layer: str) -> dict[str, Any]:
    model, adapter, readout = run.config.model, run.predictor.adapter, run.readout
    base, gguf_file = find_gguf(model_folder(model.name))
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "base_model": {
            "name": "base" if output_layer == "merge" else base,
            "fingerprint": adapter.base_fingerprint(),
            "revision": model.revision,
            "dtype": model.dtype,
            "quantization": model.quantization,
        },
        "rank": adapter.rank + adapter.perp,
        "scaling": adapter.scaling,
        "output_layer": output_layer,
        "draws": names[1:],
        "temperature": run.subspace_predictor().temperature,
        "auto_class": readout.auto_class,
    }
    if gguf_file is not None:
        manifest["base_model"]["gguf_file"] = gguf_file
    llm = adapter.llm
    if model.quantization is not None:
        unquantized = llm.config.quantization_config.llm_int8_skip_modules
        manifest["base_model"]["unquantized"] = list(unquantized)
    if run.class_names:
        manifest["classes"] = list(run.class_names)
    manifest |= readout.manifest(llm)
    manifest["sha256"] = {
        name: file_hash(folder / name / "adapter_model.safetensors") for name in names
    }
    return manifest


def _card(
    run: Run, manifest: Mapping[str, Any], metrics: Mapping[str, Mapping[str, Figure]]
) -> str:
    base = manifest["base_model"]["name"]
    lines = [*head(base, on_hub=manifest["output_layer"] != "merge")]
    lines += [f"# Bayesian LoRA on {plain(run.config.model.name)}", ""]
    lines += [
        f"`median/` and {len(manifest['draws'])} draws from the posterior of one fine-tuning run,"
        f" each an ordinary PEFT adapter of rank {manifest['rank']}.",
        "",
        "```python",
        *_snippet(manifest),
        'model = PeftModel.from_pretrained(llm, "median")  # or a name in "draws" of manifest.json',
        "```",
        "",
        "The prediction is the mean over the draws of softmax(logits / temperature), with"
        f" temperature {manifest['temperature']:g}"
        + (", of the logits of `label_ids`." if "label_ids" in manifest else ".")
        + (
            " `prompt` in manifest.json says how texts are written." if "prompt" in manifest else ""
        ),
        *_how_choices_are_scored(manifest),
        "",
        *about(run.config, {}, run.predictor.adapter.rank),
    ]
    if metrics:
        lines += ["", "## Results", "", *results(metrics)]
    lines += ["", "## Settings", "", *settings(run.config)]
    return "\n".join(lines) + "\n"


def _snippet(manifest: Mapping[str, Any]) -> list[str]:
    """Lines that load the base model with the numbers that the run computed with."""
    base, auto_class = manifest["base_model"], manifest["auto_class"]
    merged, quantization = manifest["output_layer"] == "merge", base["quantization"]
    options = [f"dtype=torch.{base['dtype']}"]
    if "num_labels" in manifest:
        options.append(f"num_labels={manifest['num_labels']}")
    if base["revision"] != "main" and not merged:
        options.append(f"revision={base['revision']!r}")
    if "gguf_file" in base and not merged:
        options.append(f"gguf_file={base['gguf_file']!r}")
    classes, setup = [auto_class], []
    if quantization and not merged:
        settings = {"load_in_8bit": "True"}
        if quantization == "4bit":
            settings = {
                "load_in_4bit": "True",
                "bnb_4bit_quant_type": "'nf4'",
                "bnb_4bit_use_double_quant": "True",
                "bnb_4bit_compute_dtype": f"torch.{base['dtype']}",
            }
        settings["llm_int8_skip_modules"] = repr(base["unquantized"])
        arguments = [f"    {name}={value}," for name, value in settings.items()]
        setup = ["quantization = BitsAndBytesConfig(", *arguments, ")"]
        classes.append("BitsAndBytesConfig")
        options.append("quantization_config=quantization")
    return [
        "import torch",
        "from peft import PeftModel",
        f"from transformers import {', '.join(classes)}",
        "",
        *setup,
        f"llm = {auto_class}.from_pretrained({base['name']!r}, {', '.join(options)})",
    ]


def _how_choices_are_scored(manifest: Mapping[str, Any]) -> list[str]:
    scoring = manifest.get("choice_likelihood")
    if scoring is None:
        return []
    normalise = scoring["normalise"]
    how = {
        "none": "",
        "unconditional": ", less the same sum behind the token that begins a text, without prompt",
    }
    return [
        f"The logit of a choice is {scoring['kappa']:.6g} · log p(choice | prompt), summed over its"
        f" tokens{how.get(normalise, f', divided by the number of its {normalise}')}."
    ]


def check_output_layer(value: str) -> None:
    if value not in OUTPUT_LAYER:
        raise ValueError(f"output_layer is {value!r}: expected one of {list(OUTPUT_LAYER)}")
