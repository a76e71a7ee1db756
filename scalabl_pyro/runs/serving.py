"""The model average of adapters that a server holds, by the completions API of OpenAI."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import torch
from torch import Tensor

from ..data import Record, Split
from ..lora.loading import load_readout
from ..prediction.predictor import Predictions
from ..readouts import LabelTokens
from .folder import read_posterior_info
from .reading import find_run, read_settings_placed

__all__ = ["ServedAverage", "ServerError"]


class ServerError(OSError):
    """A server that cannot be reached, refuses, or answers in another form."""


class ServedAverage:
    r"""Predicts by S adapters on a server, such as vLLM's with ``--enable-lora``.

    .. math:: \bar p(y \mid x) = \frac{1}{S} \sum_k \mathrm{softmax}_y
        \big(\log p_k(y \mid x) / \mathrm{temperature}\big)

    over the label words y, of which every request asks for one token's log-probabilities. Prompts
    go to the server as token ids, written as in training. No weights are loaded here.

    :param run: the run folder that was exported, or its name on the Hub: it knows the tokenizer,
        the prompt and the temperature. Its readout must be ``label_tokens``.
    :param url: of the API, such as ``http://localhost:8000/v1``.
    :param draws: the names by which the server knows the S adapters; by default all that it lists
        as ``draw_00``, ``draw_01``, ….
    :param logprobs: how many of the most probable tokens to ask for. All label words must be among
        them.
    :param timeout: of a request, in seconds.
    :raises ValueError: if the run has another readout, or the server no such adapters.
    :raises ServerError: if the server cannot be reached.
    """

    def __init__(
        self,
        run: str | Path,
        url: str,
        *,
        draws: Sequence[str] | None = None,
        logprobs: int = 20,
        timeout: float = 60.0,
    ) -> None:
        folder = find_run(run)
        info = read_posterior_info(folder)
        readout = load_readout(read_settings_placed(folder).model, info.classes)
        if not isinstance(readout, LabelTokens):
            raise ValueError(
                f"{run} reads {type(readout).__name__}: expected a run with"
                " model.readout=label_tokens, whose answers are the next token"
            )
        self.readout, self.temperature = readout, info.temperature
        self._url, self._logprobs, self._timeout = url.rstrip("/"), logprobs, timeout
        self.draws = tuple(self._listed() if draws is None else draws)
        if not self.draws:
            raise ValueError(f"no adapter is called draw_00 or like it at {url}: give draws=[…]")

    def predict(self, records: Sequence[Record]) -> Predictions:
        """Predict all N records at all S draws, one request a draw.

        :returns: with ``logits`` (S, N, C), the log-probabilities of the label words over the
            temperature.
        :raises DataError: if a record does not fit the readout.
        :raises ServerError: if the server refuses, or a label word is not among the tokens that it
            tells of.
        """
        split = self.readout.encode(records)
        with ThreadPoolExecutor(len(self.draws)) as pool:  # the server puts them in one batch
            rows = list(pool.map(lambda draw: self._log_probs(draw, split), self.draws))
        logits = torch.stack(rows) / self.temperature
        exists = torch.tensor([len(record.choices) for record in split.records])
        nowhere = torch.arange(logits.shape[-1]) >= exists[:, None]
        return Predictions(logits.masked_fill(nowhere, -torch.inf), split.labels)

    def _log_probs(self, draw: str, split: Split) -> Tensor:
        """(N, C), of the label words after each prompt."""
        prompts = [example.rows["input_ids"][0] for example in split.examples]
        reply = self._ask(
            "completions",
            {
                "model": draw,
                "prompt": prompts,
                "max_tokens": 1,
                "temperature": 0,
                "logprobs": self._logprobs,
                "return_tokens_as_token_ids": True,
            },
        )
        choices = sorted(reply["choices"], key=lambda choice: choice["index"])
        if len(choices) != len(prompts):
            raise ServerError(
                f"{self._url} answers {len(choices)} of {len(prompts)} prompts at {draw}"
            )
        pairs = zip(split.records, choices, strict=True)
        return torch.stack([self._labels(draw, *pair) for pair in pairs])

    def _labels(self, draw: str, record: Record, choice: Mapping[str, Any]) -> Tensor:
        (top,) = choice["logprobs"]["top_logprobs"]
        ids = self.readout.label_ids.tolist()
        names = [(f"token_id:{i}", self.readout.tokenizer.decode([i])) for i in ids]
        values = [top.get(by_id, top.get(text)) for by_id, text in names]
        offered = zip(self.readout.label_words, values[: len(record.choices)], strict=False)
        missing = [word for word, value in offered if value is None]
        if missing:
            raise ServerError(
                f"record {record.id!r}: the label words {missing} are not among the {len(top)} most"
                f" probable tokens at {draw}, and do not count as 0; raise logprobs above"
                f" {self._logprobs} (and vLLM's --max-logprobs)"
            )
        return torch.tensor([-torch.inf if value is None else value for value in values])

    def _listed(self) -> list[str]:
        names = [model["id"] for model in self._ask("models")["data"]]
        return sorted(name for name in names if name.startswith("draw_"))

    def _ask(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = Request(f"{self._url}/{path}", data, {"Content-Type": "application/json"})
        try:
            with urlopen(request, timeout=self._timeout) as answer:
                reply = json.load(answer)
        except HTTPError as error:
            told = error.read().decode(errors="replace")[:500]
            raise ServerError(f"{request.full_url} refuses ({error.code}): {told}") from error
        except (URLError, TimeoutError, ValueError) as error:
            raise ServerError(f"{request.full_url} gives no answer: {error}") from error
        return dict(reply)
