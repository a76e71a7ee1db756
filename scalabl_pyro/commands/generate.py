"""``scalabl generate``: continue the prompts of a file, with the uncertainty of every token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from tqdm import tqdm

from ..data.completions import read_completions
from ..prediction.generation import Decoding, ScoredText, generate
from ..runs.folder import load_run
from ._jsonl import ResumableJsonl

__all__ = ["GenerateConfig", "generate_file"]


@dataclass(frozen=True, slots=True)
class GenerateConfig:
    """Settings of ``scalabl generate``, described in configs/generate.yaml."""

    run: str
    input: str
    output: str
    decoding: Decoding = field(default_factory=Decoding)
    progress: bool = True


def generate_file(config: GenerateConfig) -> dict[str, Any]:
    """Continue the prompts of a file, one JSON object a line; go on where an earlier call stopped.

    :raises FileExistsError: if the output exists.
    :raises ValueError: if a prompt cannot be continued, or the output was begun with other settings
        or for other prompts.
    """
    records = read_completions(config.input)
    settings = {"run": config.run, "decoding": asdict(config.decoding)}
    with ResumableJsonl(config.output, [record.id for record in records], settings) as file:
        prompts = [record.prompt for record in records]
        predictor = load_run(config.run).subspace_predictor()
        texts = generate(predictor, prompts, config.decoding, start=file.done)
        with tqdm(initial=file.done, total=len(records), disable=not config.progress) as bar:
            for record, text in zip(records[file.done :], texts, strict=True):
                file.write([{"id": record.id, "prompt": record.prompt} | _line(text)])
                bar.update()
    return {"output": config.output, "records": len(records)}


def _line(text: ScoredText) -> dict[str, Any]:
    return {
        "completion": text.text,
        "tokens": list(_tokens(text)),
        "log_prob": round(text.log_prob, 6),
        "spread": round(text.spread, 6),
        "token_mutual_information": round(text.token_mutual_information, 6),
        "token_epkl": round(text.token_epkl, 6),
    }


def _tokens(text: ScoredText) -> Iterator[dict[str, Any]]:
    columns = (text.log_probs.exp(), text.entropy, text.mutual_information)
    for token, *values in zip(text.tokens, *(c.tolist() for c in columns), strict=True):
        names = ("probability", "entropy", "mutual_information")
        yield {"token": token} | {n: round(v, 6) for n, v in zip(names, values, strict=True)}
