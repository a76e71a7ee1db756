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
from transformers.trainer_utils import PredictionOutput

from ..data import Batch, Split
from ..guides import AutoSubspaceDelta
from ..infer.checks import check_elbo, check_program, first_step
from ..infer.kl import KLSchedule, kl_weight
from ..infer.messengers import ScaledToAll
from ..infer.parameters import check_moves, make_parameters, parameter_groups
from ..infer.training import no_guide
from ..models.model import LoRAModel, ScalaBLModel
from ..prediction.assessment import assess, check_labelled
from ..prediction.draws import draw
from ..prediction.metrics import average
from ..prediction.predictor import Predictor, Predicts, predict

__all__ = ["ELBOTrainer"]

#: how metrics begin that are better the lower they are
_LOW_IS_GOOD = ("loss", "nll", "brier", "ece", "adaptive_ece", "aurc", "fpr95")


class ELBOTrainer(transformers.Trainer):
    r"""``transformers.Trainer`` whose loss is −ELBO/N of a model and its guide.

    For who has that loop already, with its logging, callbacks and checkpoints. On the same batches
    and draws it moves the parameters as :func:`~scalabl_pyro.infer.fit` does, which has what a
    posterior needs beside: a KL budget, and the last good state. Evaluation is of the model
    average: ``eval_nll``, which is also ``eval_loss``, and all else that
    :func:`~scalabl_pyro.prediction.evaluate` gives.

    :param model: the probabilistic model.
    :param guide: q(s), or :func:`~scalabl_pyro.infer.no_guide` for a point estimate.
    :param args: ``max_steps`` must be set. ``learning_rate`` and ``weight_decay`` are those of the
        projections and heads; batches are drawn as ``fit`` draws them, by ``data_seed`` or else
        ``seed``.
    :param train: N labelled examples.
    :param lr_guide: learning rate of the guide, which follows the same schedule.
    :param elbo: any ELBO of Pyro with a ``differentiable_loss``, for this loop runs the backward
        pass itself; ``Trace_ELBO`` with one particle if left out.
    :param kl: schedule of the KL weight.
    :param eval_dataset: a labelled split, for ``args.eval_strategy`` and :meth:`evaluate`; or
        several by name.
    :param predictor: makes what is evaluated; if left out, an average over 10 draws of s, or of
        plain LoRA without a guide the matrices as they are.
    :param options: ``callbacks`` and ``optimizers`` of ``transformers.Trainer``; an optimizer is
        over the parameters of :func:`~scalabl_pyro.infer.parameter_groups`.
    :raises TypeError: if model, guide, ELBO or a split is something else, or ``kl`` is, or another
        option is given.
    :raises ValueError: if ``max_steps`` is not set, a record has no label, nothing is trained,
        there is nothing that could be evaluated, ``args`` asks for what this loss has not, or it
        would run on another device than the adapter's or in several processes.

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
        eval_dataset: Split | dict[str, Split] | None = None,
        predictor: Callable[[], Predicts] | None = None,
        **options: Any,
    ) -> None:
        check_program(model, guide, train)
        check_elbo(elbo, "differentiable_loss")
        _check_arguments(args, options)
        if args.max_steps < 1:
            raise ValueError(
                f"args.max_steps is {args.max_steps}: expected the number of steps, for batches are"
                " drawn without an end, and num_train_epochs has no effect"
            )
        for name, split in _by_name(eval_dataset).items():
            _check_split(split, name)
            check_labelled(split.records, name)
        if not (kl is None or isinstance(kl, KLSchedule)):
            raise TypeError(f"kl is {kl!r}: expected a KLSchedule, such as KLSchedule({kl!r})")
        best = (args.metric_for_best_model or "").removeprefix("eval_")
        for name in eval_dataset if isinstance(eval_dataset, dict) else ():
            best = best.removeprefix(f"{name}_")
        if args.greater_is_better and best.startswith(_LOW_IS_GOOD):
            raise ValueError(
                f"args.metric_for_best_model is {args.metric_for_best_model!r}, of which low values"
                " are good, and greater_is_better is true: set it to false"
            )
        if eval_dataset is not None and predictor is None:
            _check_known(model, guide)
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
        given, _ = options.get("optimizers") or (None, None)
        if given is not None:
            check_moves(given, [p for group in self._groups for p in group["params"]])
        self._train, self._adapter, self._num_data = train, model.adapter, model.num_data
        self._predictor = predictor or (lambda: _average(model, guide, train))
        self._kl = KLSchedule() if kl is None else kl
        elbo = Trace_ELBO(max_plate_nesting=1) if elbo is None else elbo
        # On a machine with several GPUs it would run a copy of model and guide on each, in threads,
        # all on the same adapter.
        args._n_gpu = min(args.n_gpu, 1)
        objective = _Objective(model, guide, elbo)
        options = {name: value for name, value in options.items() if value is not None}
        super().__init__(objective, args, eval_dataset=eval_dataset, **options)  # type: ignore[arg-type]  # which is only kept

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

    def evaluate(  # type: ignore[override]  # of splits alone
        self,
        eval_dataset: Split | dict[str, Split] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Metrics of the model average on a labelled split; logged, and told to callbacks.

        :param eval_dataset: that of the trainer if left out. Of several, metrics begin with
            ``<metric_key_prefix>_<name>_``.
        :raises TypeError: if there is no split.
        :raises DataError: if a record has no label.
        """
        split: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(split, dict):
            of_each = [
                self.evaluate(one, ignore_keys, f"{metric_key_prefix}_{name}")
                for name, one in split.items()
            ]
            return {name: value for metrics in of_each for name, value in metrics.items()}
        _check_split(split, "eval_dataset")
        self._adapter.eval()
        size = self.args.eval_batch_size
        found = assess(self._predictor(), split, batch_size=size).metrics
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        metrics[f"{metric_key_prefix}_loss"] = found["nll"]
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def predict(  # type: ignore[override]
        self,
        test_dataset: Split,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
    ) -> PredictionOutput:
        """log p̄ (N, C) of the model average, the labels (N,), and no metrics."""
        self._adapter.eval()
        size = self.args.eval_batch_size
        predictions = predict(self._predictor(), test_dataset, batch_size=size)
        labels = predictions.labels
        log_probs = average(predictions.logits).numpy()
        return PredictionOutput(log_probs, None if labels is None else labels.numpy(), {})

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        """The one given, or that of ``args`` over the two groups of parameters."""
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = kind(self._groups, **options)
        return self.optimizer

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **options: Any
    ) -> Tensor:
        """−ELBO/N of a batch, at the KL weight of this step."""
        batch, step = inputs["batch"], self.state.global_step
        moved = [p for group in self._groups for p in group["params"]]
        checks = nullcontext() if step else first_step(moved)
        scaled = ScaledToAll(self._num_data, len(batch))
        with checks, scaled, kl_weight(self._kl(step, self.args.max_steps)):
            loss: Tensor = model(batch)
        return loss


def _check_arguments(args: transformers.TrainingArguments, options: dict[str, Any]) -> None:
    """Refuse what would train something else than it says.

    :raises TypeError: for an option.
    :raises ValueError: for an argument.
    """
    known = {"callbacks", "optimizers"}
    fixes = {
        "train_dataset": "it is train here",
        "compute_metrics": "evaluation has metrics of its own; compute others from predict()",
        "data_collator": "a split collates its own batches",
        "compute_loss_func": "the loss is −ELBO/N; another one is elbo= or the model's observe",
        "optimizer_cls_and_kwargs": "give optimizers=(optimizer, None)",
    }
    for name, value in options.items():
        if name not in known and value is not None:
            fix = fixes.get(name, "leave it out")
            raise TypeError(f"{name} is given, and ELBOTrainer takes {sorted(known)} alone: {fix}")
    for name, fix in {
        "gradient_checkpointing": "pass gradient_checkpointing=True to SubspaceAdapter",
        "label_smoothing_factor": "a likelihood has none; override the model's observe",
        "neftune_noise_alpha": "noise on embeddings is no part of the model; leave it out",
    }.items():
        if value := getattr(args, name):
            raise ValueError(f"args.{name} is {value}: {fix}")
    for name in ("eval_strategy", "save_strategy", "logging_strategy"):
        if getattr(args, name) == "epoch":
            raise ValueError(
                f"args.{name} is 'epoch', and training is counted in steps (max_steps): set it to"
                " 'steps', and how many of them"
            )
    if args.world_size > 1:
        raise ValueError(
            f"args.world_size is {args.world_size}, and each process would train on the same"
            " batches: use fit, or accelerate launch -m scalabl_pyro train, which share them"
        )


def _by_name(eval_dataset: Any) -> dict[str, Any]:
    if isinstance(eval_dataset, dict):
        return {f"eval_dataset[{name!r}]": split for name, split in eval_dataset.items()}
    return {} if eval_dataset is None else {"eval_dataset": eval_dataset}


def _check_split(split: Any, name: str) -> None:
    """:raises TypeError: if it is something else."""
    if not isinstance(split, Split):
        raise TypeError(f"{name} is a {type(split).__name__}: expected adapter.encode(records)")


def _check_known(model: LoRAModel, guide: Callable[..., Any]) -> None:
    """:raises ValueError: if the posterior is over something else than s."""
    if not isinstance(model, ScalaBLModel) and guide is not no_guide:
        raise ValueError(
            f"the posterior of a {type(model).__name__} is not over s: give predictor=, a function"
            " that makes what is evaluated and predicts"
        )


def _average(model: LoRAModel, guide: Callable[..., Any], train: Split) -> Predictor:
    """What predicts with a guide over s, or with plain LoRA."""
    _check_known(model, guide)
    if not isinstance(model, ScalaBLModel):
        return Predictor(model.adapter)
    if isinstance(guide, AutoSubspaceDelta):
        return Predictor(model.adapter, guide.median()["s"][None])
    batch = train.collate(train.examples[:1]).to(model.adapter.device)
    return Predictor(model.adapter, draw(guide, 10, seed=0, batch=batch))


class _Objective(nn.Module):
    """−ELBO/N as a module, with the parameters that it trains, and with those that stay but are
    made from the data or at random, so that a checkpoint has them."""

    def __init__(self, model: LoRAModel, guide: Callable[..., Any], elbo: Any) -> None:
        super().__init__()
        self.model, self.guide, self._elbo = model, guide, elbo
        held = set(map(id, self.parameters()))  # an adapter may have been frozen since
        state = model.adapter.state()
        self.frozen = nn.ParameterDict(
            {name.replace(".", "__"): p for name, p in state.items() if id(p) not in held}
        )

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        # A checkpoint without V would go on with another one: transformers would not ask.
        return super().load_state_dict(state_dict, strict=True, assign=assign)

    def forward(self, batch: Batch) -> Tensor:
        loss: Tensor = self._elbo.differentiable_loss(self.model, self.guide, batch)
        return loss / self.model.num_data


class _Minibatches(IterableDataset):
    def __init__(self, split: Split, batch_size: int, seed: int) -> None:
        self._split, self._batch_size, self._seed = split, batch_size, seed

    def __iter__(self) -> Iterator[dict[str, Batch]]:
        for batch in self._split.minibatches(self._batch_size, seed=self._seed):
            yield {"batch": batch}
