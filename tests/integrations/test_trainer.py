"""Trainer of transformers on the ELBO, against ``fit`` on the same batches and draws."""

from __future__ import annotations

import pytest
import torch
import transformers
from conftest import ROOT, blocks, make_records, whole
from pyro.infer.autoguide import AutoNormal, init_to_value
from safetensors.torch import load_file, save_file

from scalabl_pyro import AutoSubspaceNormal, FitConfig, KLSchedule, ScalaBLModel, fit
from scalabl_pyro.data import DataError
from scalabl_pyro.infer import Callback, no_guide
from scalabl_pyro.infer.parameters import parameter_groups
from scalabl_pyro.integrations.trainer import ELBOTrainer
from scalabl_pyro.methods.blob import AutoNormalA, BLoBModel
from scalabl_pyro.models.model import LoRAModel

STEPS = 20


class SeedEach(transformers.TrainerCallback):
    """The draws of each step by its number, as below."""

    def on_step_begin(self, args, state, control, **options):
        torch.manual_seed(state.global_step)


class SeedNext(Callback):
    def on_step(self, row):
        torch.manual_seed(row["step"])


def arguments(folder, **options) -> transformers.TrainingArguments:
    settings = dict(
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        lr_scheduler_type="linear",
        warmup_steps=0,
        seed=3,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
    )
    return transformers.TrainingArguments(str(folder), **settings | options)


def test_it_ends_in_evaluation_mode(make_causal, tmp_path):
    adapter = make_causal()
    split = adapter.readout.encode(make_records(12))
    model = ScalaBLModel(adapter, num_data=len(split))
    guide = AutoSubspaceNormal(model)
    ELBOTrainer(model, guide, arguments(tmp_path, max_steps=2), split).train()
    assert not any(module.training for module in adapter.peft_model.modules())


@pytest.mark.parametrize("readout", ["make_causal", "make_choice"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_it_trains_as_fit_does(request, readout, tmp_path, accumulation):
    make = request.getfixturevalue(readout)
    states = []
    for way in ("trainer", "fit"):
        torch.manual_seed(0)
        adapter = make()
        split = adapter.readout.encode(make_records(12))
        model = ScalaBLModel(adapter, num_data=len(split))
        guide = AutoSubspaceNormal(model, init_scale=0.3)
        kl = KLSchedule(2.0, fraction=0.5)
        if way == "trainer":
            options = {"gradient_accumulation_steps": accumulation}
            trainer = ELBOTrainer(
                model,
                guide,
                arguments(tmp_path, **options),
                split,
                lr_guide=0.05,
                kl=kl,
                callbacks=[SeedEach()],
            )
            trainer.train()
        else:
            torch.manual_seed(0)
            config = FitConfig(
                steps=STEPS,
                batch_size=4,
                lr=0.01,
                lr_guide=0.05,
                warmup=0.0,
                accumulation=accumulation,
                kl=kl,
            )
            fit(model, guide, split, config, seed=3, callbacks=[SeedNext()], progress=False)
        state = {**adapter.state(), **dict(guide.named_parameters())}
        states.append({name: value.detach().clone() for name, value in state.items()})
    assert (guide.median()["s"] - adapter.init_loc).abs().max() > 0.1
    for name, value in states[0].items():
        # The bias of a head that scores each choice adds the same to all: Adam follows rounding.
        if readout == "make_choice" and name.endswith("default.bias"):
            continue
        torch.testing.assert_close(value, states[1][name], atol=1e-5, rtol=1e-5, msg=name)


def test_evaluation_is_of_the_model_average(make_causal, records, tmp_path):
    adapter = make_causal()
    split, other = adapter.encode(records), adapter.encode(make_records(9))
    model = ScalaBLModel(adapter, num_data=len(split))
    guide = AutoSubspaceNormal(model)
    args = arguments(tmp_path, max_steps=6, eval_strategy="steps", eval_steps=2)
    trainer = ELBOTrainer(model, guide, args, split, lr_guide=0.3, eval_dataset=other)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "eval_nll" in row]
    assert [row["step"] for row in rows] == [2, 4, 6]
    draws = guide_draws(guide)
    with torch.no_grad():  # a loop by hand
        each = torch.stack([adapter(whole(other), s).softmax(-1) for s in draws])
    expected = -each.mean(0).log()[torch.arange(9), other.labels].mean()
    assert rows[-1]["eval_nll"] == pytest.approx(float(expected), rel=1e-5)
    assert rows[-1]["eval_loss"] == rows[-1]["eval_nll"]
    output = trainer.predict(other)
    torch.testing.assert_close(torch.tensor(output.predictions), each.mean(0).log())
    assert output.label_ids.tolist() == other.labels.tolist()


def test_several_splits_are_evaluated_by_name(make_causal, records, tmp_path):
    adapter = make_causal()
    split, other = adapter.encode(records), adapter.encode(make_records(9))
    guide = AutoSubspaceNormal(model := ScalaBLModel(adapter, num_data=len(split)))
    args = arguments(
        tmp_path,
        eval_strategy="steps",
        eval_steps=STEPS // 2,
        save_strategy="steps",
        save_steps=STEPS // 2,
        load_best_model_at_end=True,
        metric_for_best_model="far_nll",
        greater_is_better=False,
    )
    splits = {"near": split, "far": other}
    trainer = ELBOTrainer(model, guide, args, split, eval_dataset=splits)
    trainer.train()
    found = trainer.evaluate()
    for name, one in splits.items():
        with torch.no_grad():  # a loop by hand
            each = torch.stack([adapter(whole(one), s).softmax(-1) for s in guide_draws(guide)])
        nll = -each.mean(0).log()[torch.arange(len(one)), one.labels].mean()
        assert found[f"eval_{name}_nll"] == pytest.approx(float(nll), rel=1e-5)
    steps = [row["eval_far_nll"] for row in trainer.state.log_history if "eval_far_nll" in row]
    assert trainer.state.best_metric == min(steps[:2])
    high = arguments(tmp_path, metric_for_best_model="far_nll", greater_is_better=True)
    with pytest.raises(ValueError, match="'far_nll', of which low values are good"):
        ELBOTrainer(model, guide, high, split, eval_dataset=splits)
    with pytest.raises(
        TypeError, match=r"eval_dataset\['far'\] is a list: expected adapter.encode"
    ):
        ELBOTrainer(model, guide, args, split, eval_dataset={"far": records})


def guide_draws(guide):
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        return guide.get_posterior().sample((10,))


def test_the_best_state_comes_back_and_patience_ends_it(make_causal, records, tmp_path):
    adapter = make_causal(svd=False)
    split = adapter.encode(records)
    model = LoRAModel(adapter, num_data=len(split))
    steps = dict(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1)
    best = dict(load_best_model_at_end=True, metric_for_best_model="nll", greater_is_better=False)
    args = arguments(tmp_path, learning_rate=2.0, **steps, **best)  # away from the start at once
    patience = transformers.EarlyStoppingCallback(early_stopping_patience=3)
    trainer = ELBOTrainer(model, no_guide, args, split, eval_dataset=split, callbacks=[patience])
    trainer.train()
    nlls = [row["eval_nll"] for row in trainer.state.log_history if "eval_nll" in row]
    assert len(nlls) < STEPS
    assert trainer.evaluate()["eval_nll"] == pytest.approx(min(nlls), rel=1e-5)


def test_a_point_estimate_lowers_its_loss(make_causal, records, tmp_path):
    adapter = make_causal(svd=False)
    split = adapter.readout.encode(records)
    model = LoRAModel(adapter, num_data=len(split))
    trainer = ELBOTrainer(
        model, no_guide, arguments(tmp_path, logging_strategy="steps", logging_steps=5), split
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == STEPS // 5
    assert losses[-1] < losses[0]


def test_what_cannot_train_is_refused(make_causal, records, tmp_path):
    adapter = make_causal()
    split = adapter.readout.encode(records)
    model = ScalaBLModel(adapter, num_data=len(split))
    guide = AutoSubspaceNormal(model)
    with pytest.raises(ValueError, match=r"max_steps is -1: .* num_train_epochs has no effect"):
        ELBOTrainer(model, guide, arguments(tmp_path, max_steps=-1), split)
    unlabelled = adapter.readout.encode(make_records(4, labelled=False))
    with pytest.raises(ValueError, match="needs a label in every record"):
        ELBOTrainer(model, guide, arguments(tmp_path), unlabelled)
    with pytest.raises(DataError, match="eval_dataset"):
        ELBOTrainer(model, guide, arguments(tmp_path), split, eval_dataset=unlabelled)
    trainer = ELBOTrainer(model, guide, arguments(tmp_path), split)
    for wrong in (None, records):
        with pytest.raises(TypeError, match=f"eval_dataset is a {type(wrong).__name__}: expected"):
            trainer.evaluate(wrong)
    for option in ("compute_metrics", "data_collator", "compute_loss_func", "train_dataset"):
        with pytest.raises(TypeError, match=f"{option} is given, and ELBOTrainer takes"):
            ELBOTrainer(model, guide, arguments(tmp_path), split, **{option: len})
    for name, value in (
        ("gradient_checkpointing", True),
        ("label_smoothing_factor", 0.1),
        ("neftune_noise_alpha", 5.0),
    ):
        with pytest.raises(ValueError, match=rf"args\.{name} is {value}"):
            ELBOTrainer(model, guide, arguments(tmp_path, **{name: value}), split)
    with pytest.raises(TypeError, match="model is a SubspaceAdapter: expected a LoRAModel"):
        ELBOTrainer(adapter, guide, arguments(tmp_path), split)
    args = arguments(tmp_path, metric_for_best_model="nll")  # which transformers takes for a score
    with pytest.raises(ValueError, match="'nll', of which low values are good"):
        ELBOTrainer(model, guide, args, split)
    with pytest.raises(TypeError, match=r"kl is 3\.0: expected a KLSchedule"):
        ELBOTrainer(model, guide, arguments(tmp_path), split, kl=3.0)
    for options in ({"train": records}, {"train": split, "eval_dataset": records}):
        with pytest.raises(TypeError, match=r"is a list: expected adapter.encode\(records\)"):
            ELBOTrainer(model, guide, arguments(tmp_path), **options)
    other = BLoBModel(make_causal(svd=False), num_data=12, prior_scale=1.0)
    of_A = AutoNormalA(other, init_scale=0.1)
    with pytest.raises(ValueError, match="posterior of a BLoBModel is not over s: give predictor="):
        ELBOTrainer(other, of_A, arguments(tmp_path), split, eval_dataset=split)
    with pytest.raises(ValueError, match="posterior of a BLoBModel is not over s: give predictor="):
        ELBOTrainer(other, of_A, arguments(tmp_path), split).predict(split)


def test_a_guide_that_makes_its_parameters_late_is_trained(make_causal, records, tmp_path):
    adapter = make_causal()
    split = adapter.readout.encode(records)
    model = ScalaBLModel(adapter, num_data=len(split))
    guide = AutoNormal(model, init_loc_fn=init_to_value(values={"s": adapter.init_loc}))
    ELBOTrainer(model, guide, arguments(tmp_path), split, lr_guide=0.05).train()
    assert (guide.median()["s"] - adapter.init_loc).abs().max() > 0.1
    assert (guide.scales.s - 0.1).abs().max() > 0.01


def test_a_site_that_no_guide_covers_is_refused(make_causal, records, tmp_path):
    adapter = make_causal()
    split = adapter.readout.encode(records)
    model = ScalaBLModel(adapter, num_data=len(split))
    with (
        pytest.warns(UserWarning, match="in model but not guide"),
        pytest.raises(ValueError, match=r"the latent sites \['s'\]"),
    ):
        ELBOTrainer(model, no_guide, arguments(tmp_path), split).train()


def test_the_optimizer_is_that_of_the_arguments(make_causal, records, tmp_path):
    adapter = make_causal()
    split = adapter.readout.encode(records)
    model = ScalaBLModel(adapter, num_data=len(split))
    kinds = {"adamw_torch": torch.optim.AdamW, "adafactor": transformers.Adafactor}
    for optim, kind in kinds.items():
        args = arguments(tmp_path, optim=optim, adam_epsilon=1e-4, adam_beta1=0.8)
        trainer = ELBOTrainer(model, AutoSubspaceNormal(model), args, split, lr_guide=0.05)
        optimizer = trainer.create_optimizer()
        assert type(optimizer) is kind
        assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.05]
        if kind is torch.optim.AdamW:
            assert {group["eps"] for group in optimizer.param_groups} == {1e-4}
            assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.999)}


def test_it_runs_on_one_of_several_gpus(make_causal, records, tmp_path):
    adapter = make_causal()
    split = adapter.readout.encode(records)
    model = ScalaBLModel(adapter, num_data=len(split))
    args = arguments(tmp_path)
    args._n_gpu = 2  # as transformers counts them
    trainer = ELBOTrainer(model, AutoSubspaceNormal(model), args, split)
    assert trainer.args.n_gpu == 1
    assert trainer.args.train_batch_size == 4


def test_the_snippet_of_the_documentation_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = blocks(ROOT / "docs" / "callbacks.md", "python")[-1]
    assert "max_steps=200" in code
    names: dict = {}
    short = code.replace("max_steps=200", "max_steps=3, use_cpu=True, report_to='none'")
    exec(compile(short, "callbacks.md", "exec"), names)
    assert names["predictor"].num_draws == 10


def test_several_processes_are_refused(make_causal, records, tmp_path, monkeypatch):
    """Each would draw the same batches."""
    adapter = make_causal()
    split = adapter.encode(records)
    model = ScalaBLModel(adapter, num_data=len(split))
    world = property(lambda args: 2)
    monkeypatch.setattr(transformers.TrainingArguments, "world_size", world)
    with pytest.raises(ValueError, match=r"args\.world_size is 2, .* accelerate launch"):
        ELBOTrainer(model, AutoSubspaceNormal(model), arguments(tmp_path), split)


def test_an_optimizer_of_ones_own_is_the_one_that_steps(make_causal, records, tmp_path):
    adapter = make_causal()
    split = adapter.encode(records)
    model = ScalaBLModel(adapter, num_data=len(split))
    guide = AutoSubspaceNormal(model)
    before = [p.clone() for p in (*adapter.named_parameters().values(), *guide.parameters())]
    groups = parameter_groups(model, guide, lr=0.0, lr_guide=0.0)
    still = torch.optim.SGD(groups, lr=0.0)
    args = arguments(tmp_path)
    ELBOTrainer(model, guide, args, split, optimizers=(still, None)).train()
    after = [*adapter.named_parameters().values(), *guide.parameters()]
    assert all(torch.equal(p, q) for p, q in zip(before, after, strict=True))
    other = torch.optim.SGD(guide.parameters(), lr=0.0)
    with pytest.raises(ValueError, match="the SGD given is over 2 parameters: expected the"):
        ELBOTrainer(model, guide, args, split, optimizers=(other, None))


def test_a_checkpoint_holds_a_frozen_V(make_causal, records, tmp_path):
    """It was drawn at random: another process would draw another."""
    adapter = make_causal(projections="frozen_v")
    split = adapter.encode(records)
    model = ScalaBLModel(adapter, num_data=len(split))
    args = arguments(tmp_path, save_strategy="steps", save_steps=STEPS // 2)
    ELBOTrainer(model, AutoSubspaceNormal(model), args, split).train()
    expected = {name: p.clone() for name, p in adapter.state().items()}
    (checkpoint, *_) = sorted(tmp_path.glob("checkpoint-*"), key=lambda f: int(f.name[11:]))

    again = make_causal(projections="frozen_v")
    with torch.no_grad():
        for A in again.matrices.A.values():
            A.weight.copy_(A.weight.flip(0))  # as another machine may turn it round
    model = ScalaBLModel(again, num_data=len(split))
    trainer = ELBOTrainer(model, AutoSubspaceNormal(model), args, split)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    for name, p in again.state().items():
        torch.testing.assert_close(p, expected[name])


def test_an_adapter_that_was_frozen_since_is_saved_and_old_checkpoints_are_told(
    make_causal, records, tmp_path
):
    adapter = make_causal(projections="frozen_v")
    split = adapter.encode(records)
    model = ScalaBLModel(adapter, num_data=len(split))
    adapter.freeze()
    guide = AutoSubspaceNormal(model)
    args = arguments(tmp_path, save_strategy="steps", save_steps=STEPS, max_steps=STEPS)
    ELBOTrainer(model, guide, args, split, optimizers=None).train()
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    tensors = load_file(checkpoint / "model.safetensors")
    without = {name: value for name, value in tensors.items() if not name.startswith("frozen.")}
    assert len(without) < len(tensors)
    save_file(without, checkpoint / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError, match=r"Missing key.*frozen\."):
        ELBOTrainer(model, guide, args, split).train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("strategy", ["eval_strategy", "save_strategy", "logging_strategy"])
def test_epochs_are_refused_where_steps_are_counted(make_causal, records, tmp_path, strategy):
    adapter = make_causal()
    split = adapter.encode(records)
    model = ScalaBLModel(adapter, num_data=len(split))
    args = arguments(tmp_path, **{strategy: "epoch"})
    with pytest.raises(ValueError, match=f"args.{strategy} is 'epoch', and training is counted in"):
        ELBOTrainer(model, AutoSubspaceNormal(model), args, split, eval_dataset=split)
