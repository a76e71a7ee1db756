"""The ELBO in the training loop of transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import transformers
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from ..data import Batch, Split
from ..models.model import LoRAModel
from .kl import KLSchedule, kl_weight
from .messengers import AllSites
from .parameters import make_parameters, parameter_groups

__all__ = ["ELBOTrainer"]


class ELBOTrainer(transformers.Trainer):
    r"""``transformers.Trainer`` whose loss is −ELBO/N of a model and its guide.

    For who has that loop already, with its logging, callbacks and checkpoints. On the same batches
    and draws it moves the parameters as :func:`~scalabl_pyro.infer.fit` does, which has what a
    posterior needs beside: a KL budget, validation by the model average, and the last good state.

    :param model: the probabilistic model.
    :param guide: q(s), or :func:`~scalabl_pyro.infer.no_guide` for a point estimate.
    :param args: ``max_steps`` must be set. ``learning_rate`` and ``weight_decay`` are those of the
        projections and heads; batches are drawn as ``fit`` draws them, by ``data_seed`` or else
        ``seed``.
    :param train: N labelled examples.
    :param lr_guide: learning rate of the guide, which follows the same schedule.
    :param elbo: any ELBO of Pyro; ``Trace_ELBO`` with one particle if left out.
    :param kl: schedule of the KL weight.
    :param options: of ``transformers.Trainer``, such as ``callbacks``.
    :raises ValueError: if ``max_steps`` is not set, a record has no label, nothing is trained, or
        ``args`` would run on another device than the adapter's.

    Usage::

        model = sp.ScalaBLModel(adapter, num_data=len(train))
        guide = sp.AutoSubspaceNormal(model)
        args = transformers.TrainingArguments("out", max_steps=500, learning_rate=5e-3)
        ELBOTrainer(model, guide, args, train).train()
        predictor = sp.Predictor(adapter, sp.draw(guide, 10, seed=0))
    """

    def __init__(
        self,
        model: LoRAModel,
        guide: Callable[..., Any],
        args: transformers.TrainingArguments,
        train: Split,
        *,
        lr_guide: float = 1e-2,
        elbo: Any = None,
        kl: KLSchedule | None = None,
        **options: Any,
    ) -> None:
        if args.max_steps < 1:
            raise ValueError(f"args.max_steps is {args.max_steps}: expected the number of steps")
        if train.labels is None:
            raise ValueError("training needs a label in every record")
        if args.device != model.adapter.device:
            raise ValueError(
                f"args runs on {args.device}, and the adapter on {model.adapter.device}: expected"
                " the same device"
            )
        make_parameters(guide, train)
        model.start_readout(train)
        self._groups = parameter_groups(
            model, guide, lr=args.learning_rate, lr_guide=lr_guide, weight_decay=args.weight_decay
        )
        self._train, self._adapter = train, model.adapter
        self._kl = KLSchedule() if kl is None else kl
        elbo = Trace_ELBO(max_plate_nesting=1) if elbo is None else elbo
        # On a machine with several GPUs it would run a copy of model and guide on each, in threads,
        # all on the same adapter.
        args._n_gpu = min(args.n_gpu, 1)
        super().__init__(_Objective(model, guide, elbo), args, **options)

    def train(self, *args: Any, **options: Any) -> Any:
        """As :meth:`transformers.Trainer.train`; leaves the adapter in evaluation mode."""
        try:
            return super().train(*args, **options)
        finally:
            self._adapter.eval()

    def get_train_dataloader(self) -> DataLoader:
        """Endless, in the order of :meth:`~scalabl_pyro.data.Split.minibatches`."""
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        batches = _Minibatches(self._train, self.args.train_batch_size, seed)
        return DataLoader(batches, batch_size=None)

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        """That of ``args``, over the two groups of parameters."""
        kind, options = self.get_optimizer_cls_and_kwargs(self.args)
        self.optimizer = kind(self._groups, **options)
        return self.optimizer

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **options: Any
    ) -> Tensor:
        """−ELBO/N of a batch, at the KL weight of this step."""
        # As in fit: what nothing would train is refused at the first step.
        moved = [p for group in self._groups for p in group["params"]]
        sites = nullcontext() if self.state.global_step else AllSites(moved)
        with sites, kl_weight(self._kl(self.state.global_step, self.args.max_steps)):
            loss: Tensor = model(inputs["batch"])
        return loss


class _Objective(nn.Module):
    """−ELBO/N as a module, with the parameters that it trains."""

    def __init__(self, model: LoRAModel, guide: Callable[..., Any], elbo: Any) -> None:
        super().__init__()
        self.model, self.guide, self._elbo = model, guide, elbo

    def train(self, mode: bool = True) -> _Objective:
        self.model.adapter.train(mode)
        return super().train(mode)

    def forward(self, batch: Batch) -> Tensor:
        loss: Tensor = self._elbo.differentiable_loss(self.model, self.guide, batch)
        return loss / self.model.num_data


class _Minibatches(IterableDataset):
    def __init__(self, split: Split, batch_size: int, seed: int) -> None:
        self._split, self._batch_size, self._seed = split, batch_size, seed

    def __iter__(self) -> Iterator[dict[str, Batch]]:
        for batch in self._split.minibatches(self._batch_size, seed=self._seed):
            yield {"batch": batch}
