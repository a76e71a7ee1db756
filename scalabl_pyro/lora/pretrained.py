"""From a language model and records to an adapter, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack, cast

import transformers
from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import Completion, Record
from ..readouts import Readout
from .adapter import Core, ProjectionMode, SubspaceAdapter
from .config import ModelConfig
from .loading import load_llm, load_readout, make_readout, prepare
from .subspace import few_prompts, set_perp, set_subspace

__all__ = ["LoadOptions", "from_pretrained"]


class LoadOptions(TypedDict, total=False):
    """How a model that is given by its name is loaded, as in :class:`ModelConfig`."""

    dtype: str
    quantization: str | None
    device: str
    device_map: str | None
    attention: str | None
    revision: str


def from_pretrained(
    model: str | Path | PreTrainedModel,
    lora: LoraConfig,
    records: Sequence[Record] | Sequence[Completion],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    readout: str = "label_tokens",
    prompt: str = "auto",
    template: str | None = None,
    shots: Sequence[Record] = (),
    system: str | None = None,
    chat: bool = False,
    normalise: str = "characters",
    temperature: str = "trained",
    truncate: bool = False,
    projections: ProjectionMode | None = None,
    start: str | Path | None = None,
    subspace: str = "auto",
    core: Core = "diagonal",
    perp: int = 0,
    gradient_checkpointing: bool = False,
    **loading: Unpack[LoadOptions],
) -> SubspaceAdapter:
    """An adapter on a language model, read so that it answers records like these.

    :param model: a name on the Hub, a folder, ``"embedded"`` for the model in this package, or a
        model that is loaded already. Such a one is changed in place and stays on its device.
    :param lora: rank, scaling α and target modules; heads to train whole in ``modules_to_save``.
    :param records: all that will be read: they fix the C classes and their words; or completions.
    :param tokenizer: of a model that is loaded already; else that of the model's folder is taken.
    :param readout: a name in ``READOUTS``, such as ``label_tokens`` or ``completion_tokens``.
    :param prompt: a name in ``PROMPTS``; ``auto`` is the readout's own.
    :param template: as in :class:`ModelConfig`, and so ``system``, ``chat``, ``normalise``,
        ``temperature`` and ``truncate``.
    :param shots: labelled records that are shown with their answers before each question but their
        own.
    :param projections: what is trained beside s, a mode of :class:`SubspaceAdapter`: ``frozen_v``
        if left out, as in ``scalabl train``.
    :param start: a trained PEFT adapter to start from.
    :param gradient_checkpointing: recompute activations in the backward pass.
    :param subspace: where V comes from (see :func:`~scalabl_pyro.lora.set_subspace`): ``random``,
        ``weights``, or ``activations`` of up to 256 of the records, whose labels are not looked at;
        ``auto`` is ``activations`` where V is frozen and fresh, and ``random`` elsewhere. Leave
        test records out of ``records``, or take ``random``, where not even their texts may be seen.
    :param core: what s is in a module: r numbers, or with ``full`` an r × r matrix (see
        :class:`SubspaceAdapter`).
    :param perp: k, coordinates of each module that stay at their prior (see
        :func:`~scalabl_pyro.lora.set_perp`), in directions that up to 256 of the records hardly
        excite.
    :param loading: ``dtype``, ``quantization``, ``device``, ``device_map``, ``attention`` and
        ``revision``, as in :class:`ModelConfig`, of a model given by its name.
    :raises FileNotFoundError: if the model cannot be found.
    :raises DataError: if there are no records, or the prompt cannot put them.
    :raises TypeError: if an option is unknown.
    :raises ValueError: if the tokenizer is missing or one too many, the model is of a class or size
        that does not fit the readout or the tokenizer, or an option has no effect or no such value.

    Usage::

        from peft import LoraConfig
        from pyro import infer, optim
        import scalabl_pyro as sp

        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
        adapter = sp.from_pretrained(llm, lora, records, tokenizer=tokenizer)
        train = adapter.encode(records)
        model = sp.ScalaBLModel(adapter, num_data=len(train))
        guide = sp.AutoSubspaceNormal(model)
        svi = infer.SVI(model, guide, optim.Adam({"lr": 1e-3}), infer.Trace_ELBO())
        losses = [svi.step(batch) for _, batch in zip(range(20), train.minibatches(4, seed=0))]
        predictions = sp.predict(sp.Predictor(adapter, sp.draw(guide, 10, seed=0)), records)
    """
    unknown = sorted(loading.keys() - LoadOptions.__annotations__.keys())
    if unknown:
        raise TypeError(
            f"there is no option {unknown}: expected {sorted(LoadOptions.__annotations__)}"
        )
    loaded = isinstance(model, PreTrainedModel)
    config = ModelConfig(
        type(model).__name__ if loaded else str(model),
        readout=readout,
        prompt=prompt,
        template=template,
        shots=len(shots),
        system=system,
        chat=chat,
        normalise=normalise,
        temperature=temperature,
        truncate=truncate,
        **loading,
    )
    classes = config.classes(cast(Sequence[Record], records), shots=shots)
    if isinstance(model, PreTrainedModel):
        if tokenizer is None:
            raise ValueError(f"model is a {config.name}: give its tokenizer too, as tokenizer=…")
        if loading:
            raise ValueError(
                f"{sorted(loading)} say how a model is loaded, but {config.name} is loaded already:"
                " leave them out, or give the model's name"
            )
        read = make_readout(config, classes, tokenizer, model.config)
        _check_fits(model, read)
        llm = prepare(model, read)
    else:
        if not isinstance(model, (str, Path)):
            raise ValueError(
                f"model is a {type(model).__name__}: expected a name, a folder or a model of"
                " transformers; of a PeftModel its base model"
            )
        if tokenizer is not None:
            raise ValueError(
                f"model is {config.name!r}, whose own tokenizer is taken: leave tokenizer out, or"
                " give the model itself with it"
            )
        read = load_readout(config, classes)
        llm = load_llm(config, read, heads=lora.modules_to_save or ())
    adapter = SubspaceAdapter(
        llm,
        lora,
        read,
        start=start,
        projections=projections,
        core=core,
        perp=perp,
        gradient_checkpointing=gradient_checkpointing,
    )
    prompts = adapter.encode(few_prompts(records))  # type: ignore[arg-type]
    set_subspace(adapter, subspace, prompts)
    if perp:
        set_perp(adapter, prompts)
    return adapter


def _check_fits(llm: PreTrainedModel, readout: Readout) -> None:
    """:raises ValueError: if the model's class, head or embeddings do not fit."""
    auto_class: Any = getattr(transformers, readout.auto_class)
    suffix = readout.auto_class.removeprefix("AutoModel")
    known = set(auto_class._model_mapping._model_mapping.values())
    names = {base.__name__ for base in type(llm).__mro__}
    if not (names & known or any(name.endswith(suffix) for name in names)):
        raise ValueError(
            f"model is a {type(llm).__name__}, but {type(readout).__name__} reads what"
            f" {readout.auto_class} loads: load the model by that class, or choose another readout"
        )
    readout.check_head(type(llm).__name__, llm.config)
    embeddings: Any = llm.get_input_embeddings()
    rows, tokens = embeddings.weight.shape[0], len(readout.tokenizer)
    if tokens > rows:
        raise ValueError(
            f"the tokenizer has {tokens} tokens, but the model has embeddings for {rows}: give the"
            " model's own tokenizer, or call model.resize_token_embeddings(len(tokenizer)) first"
        )
