"""The model average as a model of lm-evaluation-harness (Gao et al., doi 10.5281/zenodo.10256836).

Its command line with the model ``scalabl``:

    python -m scalabl_pyro.integrations.lm_eval --model scalabl --model_args run=runs/mine --tasks …

Texts become tokens as by the harness's own ``hf`` model, so that the untrained adapter has its
figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from ..prediction.continuations import average_log_prob, score_tokens
from ..prediction.generation import Decoding, continue_tokens
from ..prediction.predictor import Predictor
from ..prediction.texts import language_model
from ..readouts.causal import dated
from ..runs.folder import Run, load_run
from ..runs.predictors import PredictionConfig, make_predictor

__all__ = ["ModelAverageLM"]

#: what a task may ask of generation, beside the texts that end one and the number of tokens
_DECODING = ("do_sample", "temperature", "top_k", "top_p")


@register_model("scalabl")
class ModelAverageLM(TemplateLM):
    r"""A model of lm-evaluation-harness whose likelihoods are those of the average over S draws.

    .. math:: \log p(Y \mid x) = \log \frac{1}{S} \sum_k \prod_t p_k(y_t \mid x, y_{<t})

    ``is_greedy`` says whether each token of Y is the most probable one of this average, in which
    draws weigh as much as they gave the tokens before it; ``generate_until`` decodes from it. The
    likelihood of a text that exceeds the context is the mean over draws of the product of its
    windows. A temperature of the run is one of its answers' logits, and does not act on tokens.

    Usage::

        lm_eval.simple_evaluate(model=ModelAverageLM("runs/mine", draws=20), tasks=["arc_easy"])

    :param run: a run of a causal language model: its folder or ``owner/name`` on the Hub, loaded,
        or a predictor made in Python.
    :param draws: S new draws of the posterior, or those that the run saved if left out.
    :param seed: of new draws, and of tasks that sample.
    :param batch_size: texts at once, before draws multiply them.
    :param device: unused, as the harness's command line always names one: the setting
        ``model.device`` of the run decides.
    :raises ValueError: if the model is no causal language model, new draws are asked of a
        predictor, the run predicts by something else than vectors s, or the tokenizer has no token
        that begins or ends a text.
    """

    def __init__(
        self,
        run: str | Path | Run | Predictor,
        *,
        draws: int | None = None,
        seed: int = 0,
        batch_size: int | str = 16,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size is {batch_size!r}: expected a number, 1 or more")
        self.batch_size = int(batch_size)
        self.seed = seed
        predictor = _predictor(run, draws, seed)
        language_model(predictor)
        self.predictor = replace(predictor, max_rows=self.batch_size * predictor.num_draws)
        readout = predictor.adapter.readout
        self.tokenizer = readout.tokenizer
        self.max_length = readout.max_length
        if self.prefix_token_id is None:
            raise ValueError(
                "the tokenizer has no token that begins or ends a text, which the harness puts"
                " before a text without a context: set its bos_token or eos_token"
            )
        self._device = predictor.adapter.device

    # ------------------------------------------------------------------ tokens

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """With the tokenizer's special tokens, but for a text that begins with them already."""
        if add_special_tokens is None:
            begun = has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id))
            add_special_tokens = not begun
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """As in training, where a template that writes today's date gets a fixed one."""
        rendered = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **dated(self.tokenizer),
        )
        return str(rendered)

    # ------------------------------------------------------------------ likelihoods

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        pairs = [(context, own) for _, context, own in requests]
        read = score_tokens(self.predictor, pairs, progress=not disable_tqdm)
        answers = [(each.log_prob, each.greedy) for each in read]
        for (texts, *_), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        texts = [request.args[0] for request in requests]
        windows = [
            get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
            )
            for text in texts
        ]
        pairs = [[make_disjoint_window(pair) for pair in of_text] for of_text in windows]
        every = [pair for of_text in pairs for pair in of_text]
        read = iter(score_tokens(self.predictor, every, progress=not disable_tqdm))
        log_probs = []
        for text, of_text in zip(texts, pairs, strict=True):
            parts = (part.draw_log_probs for part in islice(read, len(of_text)))
            draw_log_probs = sum(parts, torch.zeros(self.predictor.num_draws))
            log_probs.append(average_log_prob(draw_log_probs))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), log_probs[-1])
        return log_probs

    # ------------------------------------------------------------------ texts

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """:raises ValueError: if a task asks for something that our decoding has not."""
        answers: dict[int, str] = {}
        alike: dict[Decoding, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(self._decoding(request.args[1]), []).append(number)
        for decoding, numbers in alike.items():
            room = self.max_length - decoding.max_new_tokens
            if room < 1:
                raise ValueError(
                    f"max_gen_toks is {decoding.max_new_tokens}, which leaves no room for a prompt"
                    f" in the context of {self.max_length}: lower it"
                )
            rows = [self.tok_encode(requests[n].args[0])[-room:] for n in numbers]
            texts = continue_tokens(self.predictor, rows, decoding)
            for number, text in zip(tqdm(numbers, disable=disable_tqdm), texts, strict=True):
                whole = self.tokenizer.decode(text.ids, skip_special_tokens=True)
                answers[number] = postprocess_generated_text(whole, list(decoding.stop), None)
                self.cache_hook.add_partial(
                    "generate_until", requests[number].args, answers[number]
                )
        return [answers[n] for n in range(len(requests))]

    def _decoding(self, asked: dict[str, Any]) -> Decoding:
        options = dict(normalize_gen_kwargs(asked, default_max_gen_toks=256))
        stop = handle_stop_sequences(options.pop("until", None), eos=None)
        settings = {name: options.pop(name) for name in _DECODING if name in options}
        if not settings.get("do_sample"):
            settings = {}  # the harness then writes temperature 0
        tokens = options.pop("max_gen_toks")
        if options:
            raise ValueError(
                f"a task asks for {sorted(options)} in generation_kwargs: expected until,"
                f" max_gen_toks, {', '.join(_DECODING)}"
            )
        return Decoding(tokens, **settings, stop=tuple(stop), weights="posterior", seed=self.seed)


def _predictor(run: str | Path | Run | Predictor, draws: int | None, seed: int) -> Predictor:
    if isinstance(run, Predictor):
        if draws is not None:
            raise ValueError(f"draws is {draws}, but a predictor has its own: leave draws out")
        return run
    loaded = run if isinstance(run, Run) else load_run(run)
    loaded.subspace_predictor()
    predictor = make_predictor(loaded, PredictionConfig(draws=draws, seed=seed if draws else 0))
    assert isinstance(predictor, Predictor)
    return predictor


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
