"""``scalabl predict`` and ``evaluate`` on a finished run."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import FAST, make_records, predictions_of, scalabl, tiny_llama, whole, write_jsonl
from safetensors.torch import load_file, save_file
from scipy import stats
from torch.quasirandom import SobolEngine

import scalabl_pyro.commands.predict as predict_command
from scalabl_pyro import Record, load_run, predict
from scalabl_pyro.commands._input import begun_for
from scalabl_pyro.data import read_folder
from scalabl_pyro.prediction import metrics
from scalabl_pyro.readouts import LabelTokens
from scalabl_pyro.runs.folder import RunFolderError
from scalabl_pyro.runs.predictors import PredictionConfig, make_predictor

pytestmark = pytest.mark.usefixtures("in_tmp")


def test_posterior_mean_differs_from_the_average(run, data, capsys):
    assert scalabl("evaluate", f"run={run}", f"data.root={data}", "progress=false") == 0
    average = json.loads(capsys.readouterr().out)
    words = ["prediction.name=median", "progress=false"]
    assert scalabl("evaluate", f"run={run}", f"data.root={data}", *words) == 0
    mean = json.loads(capsys.readouterr().out)
    assert mean["mutual_information"] < 1e-6 < 1e-5 < average["mutual_information"]


def test_metrics_are_not_written_over(run, data, capsys):
    Path("m.json").write_text("kept")
    assert scalabl("evaluate", f"run={run}", f"data.root={data}", "output=m.json") == 1
    assert "the output m.json exists" in capsys.readouterr().err
    assert Path("m.json").read_text() == "kept"


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_checkpoint_of_another_format_is_refused(run):
    edit_json(run / "posterior.json", format=99)
    with pytest.raises(RunFolderError, match="has format 99, but this version reads format 4"):
        load_run(run)


def test_a_checkpoint_of_another_model_is_refused(run, local_model):
    other = tiny_llama()
    torch.nn.init.normal_(other.model.embed_tokens.weight)
    other.save_pretrained(local_model)
    with pytest.raises(RunFolderError, match="made on other weights"):
        load_run(run)


def test_choices_that_do_not_exist_are_not_written(run):
    """Two and three choices, in a run of four."""
    records = [*make_records(2, choices=2), *make_records(3, choices=3)[2:]]
    write_jsonl(Path("in.jsonl"), records)
    words = ["input=in.jsonl", "output=o.jsonl", "progress=false"]
    assert scalabl("predict", f"run={run}", *words) == 0
    rows = [json.loads(line) for line in Path("o.jsonl").read_text().splitlines()]
    for row, count in zip(rows, (2, 2, 3), strict=True):
        assert len(row["choices"]) == len(row["probabilities"]) == count
        assert sum(row["probabilities"]) == pytest.approx(1, abs=1e-4)


def test_predict_refuses_to_overwrite(run, tmp_path, capsys):
    write_jsonl(tmp_path / "in.jsonl", make_records(2))
    (tmp_path / "o.jsonl").write_text("mine")
    assert scalabl("predict", f"run={run}", "input=in.jsonl", "output=o.jsonl") == 1
    assert "exists" in capsys.readouterr().err
    assert (tmp_path / "o.jsonl").read_text() == "mine"


def draws_by_hand(guide, kind, *, count, seed):
    """(S, M, r), of an independent normal."""
    loc, scale = guide.loc.detach(), guide.scale.detach()
    torch.manual_seed(seed)
    if kind == "independent":
        return torch.normal(loc.expand(count, *loc.shape), scale.expand(count, *loc.shape))
    if kind == "antithetic":
        half = torch.randn(count // 2, loc.numel(), dtype=torch.float64)
        noise = torch.stack([half, -half], 1).flatten(0, 1)
    else:
        points = SobolEngine(loc.numel(), scramble=True, seed=seed).draw(count, dtype=torch.float64)
        noise = torch.from_numpy(stats.norm.ppf(points))
    return loc + scale * noise.view(count, *loc.shape).float()


@pytest.mark.parametrize("kind", ["independent", "antithetic", "sobol"])
def test_draws_are_of_the_kind_and_the_seed_that_are_asked_for(run, kind):
    loaded = load_run(run)
    draws = {}
    for seed in (1, 7):
        config = PredictionConfig(draws=4, kind=kind, seed=seed)
        draws[seed] = make_predictor(loaded, config).draws
        expected = draws_by_hand(loaded.guide, kind, count=4, seed=seed)
        torch.testing.assert_close(draws[seed], expected)
    assert not torch.allclose(draws[1], draws[7])
    sums = draws[7][::2] + draws[7][1::2]
    paired = torch.allclose(sums, 2 * loaded.guide.median()["s"].expand_as(sums), atol=1e-6)
    assert paired == (kind == "antithetic")


@pytest.mark.parametrize(("share", "depth"), [(0.2, 0), (0.25, 0), (0.5, 1), (0.75, 2), (1.0, 2)])
def test_a_share_of_the_blocks_is_held_at_the_median(run, share, depth):
    """Of two blocks, the nearest number."""
    loaded = load_run(run)
    predictor = make_predictor(loaded, PredictionConfig(draws=3, trunk=share))
    moves = (predictor.draws != loaded.guide.median()["s"]).flatten(2).any(-1).all(0)
    blocks = [re.search(r"layers\.(\d)", name) for name in predictor.adapter.module_names]
    assert moves.tolist() == [block is None or int(block[1]) >= depth for block in blocks]


@pytest.mark.parametrize(
    ("kind", "count", "words"),
    [
        ("sobol", 4, []),
        ("antithetic", 6, ["prediction.tolerance=1e-9"]),  # which no draws but all reach
        ("independent", 50, ["prediction.name=linearised"]),
    ],
)
def test_other_ways_to_predict(run, data, capsys, kind, count, words):
    """The NLL is that of the draws by hand, one by one."""
    where = [f"run={run}", f"data.root={data}", "progress=false", "prediction.seed=3"]
    words = [f"prediction.draws={count}", f"prediction.kind={kind}", *words]
    assert scalabl("evaluate", *where, *words) == 0
    printed = json.loads(capsys.readouterr().out)
    loaded = load_run(run)
    split = loaded.encode(read_folder(data)["test"])
    adapter, median = loaded.predictor.adapter, loaded.guide.median()["s"]

    @torch.no_grad()
    def logits(s):
        return adapter(whole(split), s)

    def linear(s):
        step = 0.05 * (s - median)
        return logits(median) + (logits(median + step) - logits(median - step)) / 0.1

    at = linear if "prediction.name=linearised" in words else logits
    draws = draws_by_hand(loaded.guide, kind, count=count, seed=3)
    average = torch.stack([at(s).softmax(-1) for s in draws]).mean(0)
    expected = torch.nn.functional.nll_loss(average.log(), split.labels)
    assert printed["nll"] == pytest.approx(float(expected), rel=1e-4)


def test_bad_ways_to_predict_are_refused(run, data, capsys, local_model):
    where = [f"run={run}", f"data.root={data}", "progress=false"]
    for words, message in {
        ("prediction.name=mean",): "prediction.name is 'mean'",
        ("prediction.kind=sobol",): "give prediction.draws",
        (
            "prediction.name=median",
            "prediction.tolerance=0.1",
        ): "takes no draws, trunk or tolerance",
        ("prediction.draws=0",): "prediction.draws is 0",
        ("prediction.trunk=2",): "prediction.trunk is 2.0",
    }.items():
        assert scalabl("evaluate", *where, *words) == 1
        assert message in capsys.readouterr().err
    point = ["method=mle", f"model.name={local_model}", f"data.root={data}", "run_dir=point"]
    assert scalabl("train", *point, *FAST) == 0
    assert scalabl("evaluate", "run=point", f"data.root={data}", "prediction.name=median") == 1
    assert "no posterior over s" in capsys.readouterr().err


def test_what_needs_draws_of_s_says_so_of_a_run_without(local_model, data, tmp_path, capsys):
    where = [f"model.name={local_model}", f"data.root={data}", "run_dir=out"]
    assert scalabl("train", "method=ensemble", "method.members=2", *where, *FAST) == 0
    (tmp_path / "in.jsonl").write_text(json.dumps({"id": "a", "prompt": "the cat"}) + "\n")
    for words in (
        ["evaluate", "run=out", f"data.root={data}", "prediction.name=median"],
        ["export", "run=out", "output=exported"],
        ["generate", "run=out", "input=in.jsonl", "output=o.jsonl"],
    ):
        assert scalabl(*words) == 1
        message = capsys.readouterr().err
        assert "no posterior over s" in message or "method ensemble predicts by" in message
    assert "report, evaluate, predict, select, distill and show-prompts alone" in message
    assert not (tmp_path / "exported").exists()
    questions = write_jsonl(tmp_path / "questions.jsonl", make_records(9))
    words = ["run=out", f"input={questions}", "output=student", "fit.steps=2"]
    assert scalabl("distill", *words, "fit.lr=1e-5", "progress=false") == 0
    unlabelled = write_jsonl(tmp_path / "unlabelled.jsonl", make_records(9, labelled=False))
    assert scalabl("select", "run=out", f"input={unlabelled}", "output=s.jsonl", "count=2") == 0


def test_predict_goes_on_where_it_was_killed(run, tmp_path, capsys, monkeypatch):
    write_jsonl(tmp_path / "in.jsonl", make_records(9))
    words = [f"run={run}", "input=in.jsonl", "progress=false", "batch_size=2"]
    assert scalabl("predict", *words, "output=whole.jsonl") == 0
    calls = []
    original = predict_command.predict

    def ends(*args, **kwargs):
        calls.append(None)
        if len(calls) > 3:
            raise RuntimeError("pulled the plug")
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(predict_command, "predict", ends)
        assert scalabl("predict", *words, "output=out.jsonl") == 1
    assert scalabl("predict", *words, "output=out.csv") == 1
    message = "what is written are JSON Lines: expected a name such as out.jsonl"
    assert message in capsys.readouterr().err
    part = tmp_path / "out.jsonl.part"
    assert len(part.read_text().splitlines()) == 6
    part.write_bytes(part.read_bytes() + b'{"id": "torn')
    assert scalabl("predict", *words, "output=out.jsonl", "prediction.name=median") == 1
    assert "was begun with other settings" in capsys.readouterr().err
    # The same ids with other choices, and the same folder with another run.
    asked = tmp_path / "in.jsonl"
    before = asked.read_text()
    rows = [json.loads(line) for line in before.splitlines()]
    turned = [row | {"choices": row["choices"][::-1]} for row in rows]
    asked.write_text("".join(json.dumps(row) + "\n" for row in turned))
    assert scalabl("predict", *words, "output=out.jsonl") == 1
    assert "begun with other settings: other records: go on with" in capsys.readouterr().err
    asked.write_text(before)
    weights = Path(words[0].removeprefix("run=")) / "projections.safetensors"
    tensors = load_file(weights)
    save_file({name: value + 1 for name, value in tensors.items()}, weights)
    info = weights.with_name("posterior.json")
    kept = info.read_text()
    info.write_text(json.dumps(json.loads(kept) | {"sha256": {}}))
    assert scalabl("predict", *words, "output=out.jsonl") == 1
    assert "begun with other settings: other weights: go on with" in capsys.readouterr().err
    save_file(tensors, weights)
    info.write_text(kept)
    assert scalabl("predict", *words, "output=out.jsonl") == 0
    assert (tmp_path / "out.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    assert [p.name for p in tmp_path.glob("out.jsonl*")] == ["out.jsonl"]


def test_predict_encodes_each_record_once_and_averages_each_chunk_once(run, monkeypatch):
    write_jsonl(Path("in.jsonl"), make_records(9))
    seen, averaged = [], []
    encode, average = LabelTokens.encode, metrics.average
    with monkeypatch.context() as patch:
        patch.setattr(LabelTokens, "encode", lambda r, x: (seen.extend(x), encode(r, x))[1])
        patch.setattr(metrics, "average", lambda x: (averaged.append(len(x)), average(x))[1])
        words = [f"run={run}", "input=in.jsonl", "output=o.jsonl", "batch_size=4"]
        assert scalabl("predict", *words, "progress=false") == 0
    assert [record.id for record in seen] == [f"q{n}" for n in range(9)]
    assert len(averaged) == 3


@pytest.mark.parametrize("done", [1, 5, 6, 8])
def test_predictions_that_go_on_inside_a_chunk_are_the_same_to_the_bit(run, tmp_path, done):
    """Rounding depends on what runs together, so that chunks begin where they began."""
    write_jsonl(tmp_path / "in.jsonl", make_records(11))
    words = [f"run={run}", "input=in.jsonl", "progress=false", "batch_size=4"]
    seen = []

    def recorded(predictor, split, **options):
        seen.append([record.id for record in split.records])
        return predict(predictor, split, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict_command, "predict", recorded)
        assert scalabl("predict", *words, "output=whole.jsonl") == 0
        lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
        chunks = seen[:]

        def ends(*args, **options):
            raise RuntimeError("pulled the plug")

        patch.setattr(predict_command, "predict", ends)
        assert scalabl("predict", *words, "output=out.jsonl") == 1
        settings = settings_of(run) | begun_for(load_run(run), make_records(11))
        part = predict_command.ResumableJsonl("out.jsonl", [f"q{i}" for i in range(11)], settings)
        with part as file:
            file.write(json.loads(line) for line in lines[:done])
        seen.clear()
        patch.setattr(predict_command, "predict", recorded)
        assert scalabl("predict", *words, "output=out.jsonl") == 0
    assert seen == chunks[done // 4 :]
    assert (tmp_path / "out.jsonl").read_bytes() == b"".join(lines)


def settings_of(run):
    method = dataclasses.asdict(predict_command.PredictConfig("", "", "").prediction)
    return {"run": str(run), "prediction": method, "batch": 4}


@pytest.mark.parametrize("where", ["s", "lora_A", "lora_B"])
def test_a_run_that_is_not_finite_answers_nothing(run, tmp_path, capsys, where):
    path = run / ("posterior.safetensors" if where == "s" else "projections.safetensors")
    tensors = load_file(path)
    name = next(n for n in tensors if n == where or f".{where}." in n)
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, path)
    write_jsonl(tmp_path / "in.jsonl", make_records(3))
    assert scalabl("predict", f"run={run}", "input=in.jsonl", "output=o.jsonl") == 1
    assert f"{path} holds NaN or infinity in ['{name}']" in capsys.readouterr().err
    assert not list(tmp_path.glob("o.jsonl*"))


def test_predict_proba_takes_records(run, data):
    trained = load_run(run)
    records = read_folder(data)["test"]
    logits = predictions_of(run)["test"].logits
    probs = trained.predict_proba(records)
    torch.testing.assert_close(probs, logits.softmax(-1).mean(0), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="differ from record to record"):
        trained.predict_proba(["the cat runs"])


def test_records_that_trained_the_run_are_told(run, data, capsys):
    """Whatever the order of their choices, their labels and their ids."""
    train = read_folder(data)["train"][:5]
    turned = [Record(f"x{n}", r.question, r.choices[::-1], 0) for n, r in enumerate(train)]
    write_jsonl(Path("mixed.jsonl"), [*turned, *make_records(20)[16:19]])
    assert scalabl("evaluate", f"run={run}", "data.path=mixed.jsonl", "progress=false") == 0
    assert "5 of 8 records trained the run: these metrics" in capsys.readouterr().err
    words = [f"run={run}", "input=mixed.jsonl", "output=o.jsonl", "progress=false"]
    words += ["conformal=lac", "coverage=0.5"]
    assert scalabl("predict", *words, "calibration=mixed.jsonl") == 0
    assert (
        "5 of 8 records trained the run: what they say of coverage holds" in capsys.readouterr().err
    )
    for split in ("validation", "test"):
        where = [f"data.root={data}", f"split={split}", "progress=false"]
        assert scalabl("evaluate", f"run={run}", *where) == 0
        assert "trained the run" not in capsys.readouterr().err


@pytest.mark.parametrize("missing", [slice(2, 3), slice(None)], ids=["one", "all"])
def test_records_without_a_label_are_named_before_any_pass(
    run, local_model, data, capsys, monkeypatch, missing
):
    records = make_records(4)
    records[missing] = [dataclasses.replace(r, label=None) for r in records[missing]]
    first = records[missing][0].id
    write_jsonl(Path("q.jsonl"), records)
    write_jsonl(data / "test.jsonl", records)

    def runs(*args, **options):
        raise AssertionError("the model ran")

    monkeypatch.setattr("scalabl_pyro.prediction.assessment.predict", runs)
    for what in (f"run={run}", f"model.name={local_model}"):
        for where, place in (("data.path=q.jsonl", "q.jsonl"), (f"data.root={data}", "split test")):
            assert scalabl("evaluate", what, where, "progress=false") == 1
            assert f"{place}: record '{first}' has no label" in capsys.readouterr().err


def test_a_question_that_is_too_long_is_cut_where_the_run_says_so(run, capsys):
    (record,) = make_records(1)
    long = replace(record, question=" ".join(["the cat runs"] * 40))
    write_jsonl(Path("in.jsonl"), [long])
    words = [f"run={run}", "input=in.jsonl", "output=out.jsonl", "progress=false"]
    assert scalabl("predict", *words) == 1
    assert "of a finished run set truncate in its config.yaml to true" in capsys.readouterr().err
    settings = run / "config.yaml"
    settings.write_text(settings.read_text().replace("truncate: false", "truncate: true"))
    assert scalabl("predict", *words) == 0
    assert json.loads(Path("out.jsonl").read_text())["answer"] in record.choices
