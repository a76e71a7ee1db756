"""Distillation: a plain LoRA adapter whose single pass gives the model average."""

from __future__ import annotations

from dataclasses import replace

import pyro
import torch
from torch import Tensor

from ..data import Batch, Split
from ..infer.fit_config import FitConfig
from ..infer.svi import fit
from ..infer.training import FitResult, no_guide
from ..lora.adapter import SubspaceAdapter
from ..lora.layers import PERP
from ..models.model import LoRAModel
from .predictor import Predictor

__all__ = ["distill", "divergence", "fold_into"]


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) in nats, (…): Σ_c p_c (log p_c − log q_c), to which a choice that does not exist,
    with −∞ on both sides, adds nothing.

    :param log_p: (…, C); ``log_q`` of the same shape.
    """
    missing = log_p.isneginf()
    log_p, log_q = log_p.masked_fill(missing, 0.0), log_q.masked_fill(missing, 0.0)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@torch.no_grad()
def fold_into(adapter: SubspaceAdapter, s: Tensor, student: SubspaceAdapter) -> None:
    """Make a plain LoRA adapter compute what the subspace adapter computes at one s.

    :param s: (M, r), such as the posterior's median.
    :param student: on the same base model, with the same LoRA layers and heads, and ``svd=False``;
        changed in place.
    :raises ValueError: if its layers differ.
    """
    if student.unit:
        raise ValueError("the student has projections='unit', which rescales A: make it 'free'")
    with adapter.folded(s):
        # The rows of s_perp are at its mean, 0, and a student has none.
        source = {n: p for n, p in adapter.state().items() if f".{PERP}." not in n}
        target = student.state()
        shapes = {n: tuple(p.shape) for n, p in source.items()}
        wrong = shapes.items() ^ {n: tuple(p.shape) for n, p in target.items()}.items()
        if wrong:
            raise ValueError(
                "the student has other layers than the adapter; these are missing on one side or"
                f" differ in shape: {sorted({name for name, _ in wrong})}"
            )
        for name, parameter in target.items():
            parameter.copy_(source[name])


def distill(
    student: SubspaceAdapter,
    split: Split,
    log_probs: Tensor,
    config: FitConfig,
    *,
    seed: int = 0,
    progress: bool = True,
) -> tuple[Predictor, FitResult]:
    r"""Train a plain LoRA adapter towards the model average (Hinton et al. 2015, arXiv 1503.02531;
    Korattikara et al. 2015, arXiv 1506.04416).

    .. math:: \min \frac{1}{N} \sum_n KL\big(\bar p(· \mid x_n) \,\|\, q(· \mid x_n)\big)

    The average is computed once, so the teacher need not stay in memory::

        log_probs = average(predict(teacher, split).logits)
        fold_into(teacher.adapter, guide.median()["s"], student)
        predictor, _ = distill(student, split, log_probs, FitConfig(steps=400))

    Uncertainty of a single pass is one number: entropy stays, mutual information does not.

    :param student: best started at the posterior's median, by :func:`fold_into` or from the
        ``adapter`` folder of a run; changed in place. ``folded(student.identity())`` saves it as an
        ordinary PEFT adapter.
    :param split: N inputs; labels are not looked at and may be missing.
    :param log_probs: (N, C), log p̄.
    :param config: of the same training loop; its history calls the divergence ``nll``.
    :returns: a deterministic predictor, and the training history.
    :raises ValueError: if ``log_probs`` has not a row for each example.
    """
    expected = (len(split), split.collate(split.examples[:1]).choices.shape[-1])
    if tuple(log_probs.shape) != expected:
        raise ValueError(
            f"log_probs has shape {tuple(log_probs.shape)}: expected (N, C) = {expected}"
        )
    # A row's label is its number: the row of log_probs that it learns from.
    numbered = [replace(example, label=n) for n, example in enumerate(split)]
    model = _SoftLabels(student, log_probs.to(student.device))
    train = Split(split.records, numbered, split.collate)
    result = fit(model, no_guide, train, config, seed=seed, progress=progress)
    return Predictor(student), result


class _SoftLabels(LoRAModel):
    """The likelihood exp(−KL(p̄ ‖ q)) of each example, whose labels are rows of ``log_probs``."""

    def __init__(self, adapter: SubspaceAdapter, log_probs: Tensor) -> None:
        super().__init__(adapter, num_data=len(log_probs))
        self._log_probs = log_probs

    def start_readout(self, train: Split) -> None:
        """Nothing: the teacher's, which :func:`fold_into` copies, is the best start."""

    def observe(self, batch: Batch, logits: Tensor) -> Tensor:
        batch = batch.to(logits.device)
        with self.data_plate(batch):
            kl = divergence(self._log_probs[batch.labels], logits.log_softmax(-1))
            pyro.factor("label", -kl)
        return logits
