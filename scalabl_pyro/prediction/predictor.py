"""Prediction: the average of the probabilities over fixed draws of s."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from ..data import Batch, Record, Split
from ..infer.training import NonFiniteLossError
from ..lora.adapter import SubspaceAdapter
from .halving import halving
from .metrics import average, entropy, half_width, mutual_information, noise_to_signal

__all__ = [
    "MAX_ROWS",
    "NonFinitePredictionsError",
    "Predictions",
    "Predictor",
    "Predicts",
    "RunPredictor",
    "predict",
    "predict_proba",
]

log = logging.getLogger(__name__)

#: most sequences in one forward pass, if not told
MAX_ROWS = 256
#: tokens in one forward pass on a CPU: with more, activations leave its cache
_CPU_TOKENS = 4096
#: fewest draws of which a spread is estimated
_FEWEST = 4


class NonFinitePredictionsError(NonFiniteLossError, ValueError):
    """Logits that are NaN or infinite: what is averaged over them would be no probabilities.

    :param found: where they were found.
    """

    def __init__(self, found: str) -> None:
        super().__init__(found)
        self.found = found

    def __str__(self) -> str:
        return (
            f"{self.found}. Weights or draws that are NaN or far too large give this: train again"
            " with a lower lr; so does float16, which ends at 65,504: take model.dtype=bfloat16 or"
            " float32"
        )


class Predicts(Protocol):
    """What :func:`predict` needs: logits (S, B, C) of a batch."""

    @property
    def adapter(self) -> SubspaceAdapter: ...

    @property
    def num_draws(self) -> int: ...

    def logits(self, batch: Batch) -> Tensor: ...


class RunPredictor(Predicts, Protocol):
    """What a method returns and a run folder keeps: it names its own tensors."""

    def state(self) -> dict[str, Tensor]: ...


@dataclass(slots=True, eq=False)
class Predictor:
    """Predicts with one adapter: logits (S, B, C) at S draws of s, or (1, B, C) of plain LoRA.

    :param adapter: the trained model.
    :param draws: (S, M, r), or (S, M, r + k) with s_perp, or ``None`` for a deterministic plain
        LoRA.
    :param temperature: divides the logits of the answers; a model's own texts are read without it.
    :param max_rows: as many draws run in one forward pass as have so many sequences together, and
        one at least: a batch is never split. If ``None``, 256, and on a CPU no more than hold 4,096
        tokens, so that activations stay in its cache. Where memory runs out it is halved, with a
        line in the log.
    :raises ValueError: if the draws have another shape or hold NaN or infinity, or the temperature
        is not above 0.

    Usage::

        predictor = Predictor(adapter, draw(guide, 10, seed=0))
        predictions = predict(predictor, records)
        predictions.probabilities, predictions.mutual_information  # (N, C) and (N,)
        metrics = evaluate(predictions.logits, predictions.labels)
    """

    adapter: SubspaceAdapter
    draws: Tensor | None = None
    temperature: float = 1.0
    max_rows: int | None = None

    def __post_init__(self) -> None:
        M, r = self.adapter.shape
        k = getattr(self.adapter, "perp", 0)  # any function of s may stand for the adapter
        shapes = ((M, r), (M, r + k))
        if self.draws is not None and (self.draws.dim() != 3 or self.draws.shape[1:] not in shapes):
            raise ValueError(
                f"draws has shape {tuple(self.draws.shape)}: expected (S, M, r) = (S, {M}, {r})"
                + (f", or (S, {M}, {r + k}) with s_perp" if k else "")
                + "; one s (M, r) is s[None], of chains it is chains.thin(S), and of what"
                " Predictive returns, (S, 1, M, r), it is s.squeeze(1)"
            )
        if self.draws is not None and not len(self.draws):
            raise ValueError("draws holds no draw: expected (S, M, r), S of 1 or more")
        if self.draws is not None and not self.draws.isfinite().all():
            bad = (~self.draws.isfinite()).flatten(1).any(-1).nonzero().flatten().tolist()
            raise ValueError(
                f"draws holds NaN or infinity in {len(bad)} of {len(self.draws)} draws, the first"
                f" of which is {bad[0]}: expected finite numbers; train again with a lower lr_guide"
            )
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"temperature is {self.temperature}: expected a finite number above 0, which"
                " divides the logits"
            )

    @property
    def num_draws(self) -> int:
        """S; 1 if deterministic."""
        return 1 if self.draws is None else len(self.draws)

    def state(self) -> dict[str, Tensor]:
        """The draws as ``s``, if there are some."""
        return {} if self.draws is None else {"s": self.draws}

    @torch.no_grad()
    def logits(self, batch: Batch, some: slice = slice(None)) -> Tensor:
        """(S, B, C) in float32, −inf where a choice does not exist.

        :param some: which of the draws.
        :raises torch.OutOfMemoryError: if a single draw of the batch does not fit.
        """
        if self.draws is None:
            return self.adapter(batch)[None] / self.temperature
        *shape, tokens = batch.inputs["input_ids"].shape
        rows = math.prod(shape)
        draws = self.draws[some]
        run: Callable[[Tensor], Tensor] = partial(self.adapter, batch)

        def of(part: slice) -> Tensor:
            nonlocal run
            if part.start == 0 and part.stop < len(draws):
                run = self.adapter.above_trunk(batch, draws)
            return run(draws[part])

        def shrink(count: int, half: int) -> None:
            self.max_rows = rows * half
            log.warning(
                "out of memory with %d draws of a batch of %d rows at once: going on with %d",
                *(count, rows, half),
            )

        logits = halving(len(draws), lambda: max(1, self.most_rows(tokens) // rows), of, shrink)
        return torch.cat(list(logits)) / self.temperature

    def most_rows(self, tokens: int = 1) -> int:
        """Sequences of so many tokens, padding included, that may run in one forward pass."""
        if self.max_rows is not None:
            return self.max_rows
        on_cpu = self.adapter.device.type == "cpu"
        return min(MAX_ROWS, _CPU_TOKENS // tokens) if on_cpu else MAX_ROWS


class Predictions(NamedTuple):
    """Logits of a whole split, and what follows from them, computed at each access.

    :param logits: (S, N, C) on the CPU, −inf where a choice does not exist.
    :param labels: (N,), or ``None``.
    :param used: (N,), how many draws each example took, if not all S. Its logits then repeat these,
        which leaves every average over draws as it was.
    """

    logits: Tensor
    labels: Tensor | None
    used: Tensor | None = None

    @property
    def probabilities(self) -> Tensor:
        """(N, C), the average over the draws."""
        return average(self.logits).exp()

    @property
    def entropy(self) -> Tensor:
        """(N,) in nats, see :func:`~scalabl_pyro.prediction.entropy`."""
        return entropy(self.logits)

    @property
    def mutual_information(self) -> Tensor:
        """(N,) in nats, see :func:`~scalabl_pyro.prediction.mutual_information`."""
        return mutual_information(self.logits)

    @property
    def noise_to_signal(self) -> Tensor:
        """(N,), see :func:`~scalabl_pyro.prediction.noise_to_signal`."""
        return noise_to_signal(self.logits)


def predict(
    predictor: Predicts,
    data: Split | Sequence[Record],
    *,
    batch_size: int = 64,
    tolerance: float | None = None,
    progress: bool = False,
) -> Predictions:
    """Predict all N examples, with the same draws for every batch.

    Examples run in the order of their length, so that little is padded, and come back in their own.

    :param data: a split, or records with or without labels, which the readout encodes.
    :param batch_size: B of a forward pass before draws multiply it.
    :param tolerance: stop drawing for an example when its :func:`half_width` is at most so much, in
        probability. It is looked at after each divisor of S that is 4 or more, so that an S with
        many of them, such as 12, 24 or 48, stops soonest.
    :raises ValueError: if a tolerance is not above 0, or the predictor has one draw or none; for
        completions, which have no choices.
    :raises DataError: if a record does not fit the readout.
    :raises NonFinitePredictionsError: if a logit is NaN or infinite where there is a choice.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: expected 1 or more")
    if tolerance is not None and not (
        tolerance > 0 and isinstance(predictor, Predictor) and predictor.num_draws > 1
    ):
        raise ValueError(
            f"tolerance is {tolerance}: expected a number above 0, and a predictor with several"
            " draws of s"
        )
    split = data if isinstance(data, Split) else predictor.adapter.readout.encode(data)
    predictor.adapter.eval()
    ordered, place = split.by_length()
    parts, used = [], []
    for chunk in tqdm(ordered.batches(batch_size), disable=not progress):
        if tolerance is not None and isinstance(predictor, Predictor):
            logits, draws = _until_settled(predictor, chunk, tolerance)
            used.append(draws)
        else:
            batch = chunk.collate(chunk.examples)
            logits = _finite(predictor.logits(batch).cpu(), batch, chunk)
        parts.append(logits)
    return Predictions(
        torch.cat(parts, dim=1)[:, place],
        split.labels,
        torch.cat(used)[place] if used else None,
    )


def predict_proba(predictor: Predicts, data: Split | Sequence[Record], **options: Any) -> Tensor:
    """Averaged probabilities of C choices, (N, C).

    :param data: a split, or records with or without labels.
    :param options: of :func:`predict`.
    :raises DataError: if a record does not fit the readout.
    """
    return predict(predictor, data, **options).probabilities


def _finite(logits: Tensor, batch: Batch, split: Split) -> Tensor:
    """(S, B, C), as they are.

    :param split: the B examples of the batch.
    :raises NonFinitePredictionsError: if one of an existing choice is NaN or infinite.
    """
    if logits.dim() != 3:
        raise ValueError(
            f"predict gives logits (S, B, C) of C choices, but {tuple(logits.shape)} are those of a"
            " readout that reads texts, such as CompletionTokens: for the probability of a"
            " completion take score, to continue a prompt generate"
        )
    bad = ~logits.isfinite() & batch.choices.cpu()
    if not bad.any():
        return logits
    k, b, c = bad.nonzero()[0].tolist()
    raise NonFinitePredictionsError(
        f"{int(bad.any(-1).any(0).sum())} of {len(split)} examples have logits that are not"
        f" finite, such as record {split.records[b].id!r}: {float(logits[k, b, c])} for"
        f" choice {c} at draw {k}"
    )


def _until_settled(predictor: Predictor, split: Split, tolerance: float) -> tuple[Tensor, Tensor]:
    """Logits (S, B, C), and the number of draws behind each example's, (B,)."""
    S = predictor.num_draws
    stops = [n for n in range(_FEWEST, S) if S % n == 0] + [S]
    logits = torch.empty(0)
    used = torch.full((len(split),), S)
    pending = torch.arange(len(split))
    done = 0
    for stop in stops:
        unsettled = split.select(pending.tolist())
        batch = unsettled.collate(unsettled.examples)
        part = predictor.logits(batch, slice(done, stop)).cpu()
        if not done:
            logits = torch.empty(S, *part.shape[1:])
        logits[done:stop, pending] = _finite(part, batch, unsettled)
        settled = half_width(logits[:stop, pending]) <= tolerance
        if stop < S:
            for b in pending[settled].tolist():
                logits[:, b] = logits[:stop, b].repeat(S // stop, 1)
                used[b] = stop
        pending, done = pending[~settled], stop
        if not len(pending):
            break
    return logits, used
