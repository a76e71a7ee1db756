"""``scalabl generate``: continue prompts, or answer conversations, with the uncertainty of every
token."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..data import Columns, Completion
from ..prediction.generation import Decoding, generate
from ..runs.folder import load_run
from ..runs.settings import ConfigError
from ._input import begun_for, read_texts
from ._jsonl import ResumableJsonl, new_jsonl
from ._texts import given, scored

__all__ = ["GenerateConfig", "generate_file"]


@dataclass(frozen=True, slots=True)
class GenerateConfig:
    """Settings of ``scalabl generate``, described in configs/generate.yaml.

    :raises ValueError: if not exactly one of ``input``, ``prompt`` and ``messages`` is given, or
        ``input`` without ``output``.
    """

    run: str
    input: str | None = None
    output: str | None = None
    decoding: Decoding = field(default_factory=Decoding)
    progress: bool = True
    prompt: str | None = None
    messages: str | None = None
    columns: Columns = field(default_factory=Columns)

    def __post_init__(self) -> None:
        values = {name: getattr(self, name) for name in ("input", "prompt", "messages")}
        if sum(value is not None for value in values.values()) != 1:
            shown = ", ".join(f"{name} is {value!r}" for name, value in values.items())
            raise ConfigError(f"{shown}: give exactly one")
        if self.input is not None and self.output is None:
            raise ConfigError("output is null: give output=FILE.jsonl, where the texts go")

    def records(self) -> list[Completion]:
        """What is to be continued.

        :raises DataError: if it is no text and no messages.
        """
        if self.input is not None:
            return read_texts(self.input, self.run, self.columns)
        if self.prompt is not None:
            return [Completion("1", self.prompt)]
        try:
            messages = json.loads(str(self.messages))
        except ValueError as error:
            raise ConfigError(
                f"messages is {self.messages!r}, no JSON ({error}): expected"
                ' \'[{"role": "user", "content": "…"}]\''
            ) from error
        return [Completion.from_mapping({"id": "1", "messages": messages})]


def generate_file(config: GenerateConfig) -> dict[str, Any]:
    """Continue prompts, or answer conversations: those of a file to a file, one JSON object a line,
    where an earlier call stopped; or a single one, which is returned if there is no output.

    :raises FileExistsError: if the output exists.
    :raises ValueError: if a prompt cannot be continued, or the output was begun with other settings
        or for other prompts.
    """
    records = config.records()
    prompts = [record.prompt for record in records]
    if config.output is None:
        predictor = load_run(config.run).subspace_predictor()
        (record,), (text,) = records, generate(predictor, prompts, config.decoding)
        return given(record) | {k: v for k, v in scored(text).items() if k != "tokens"}
    new_jsonl(Path(config.output))  # before a large model is loaded
    run = load_run(config.run)
    predictor = run.subspace_predictor()
    settings = {
        "run": config.run,
        "decoding": asdict(config.decoding),
        **begun_for(run, records),
    }
    with ResumableJsonl(config.output, [record.id for record in records], settings) as file:
        texts = generate(predictor, prompts, config.decoding, start=file.done)
        with tqdm(initial=file.done, total=len(records), disable=not config.progress) as bar:
            for record, text in zip(records[file.done :], texts, strict=True):
                file.write([given(record) | scored(text)])
                bar.update()
    return {"output": config.output, "records": len(records)}
