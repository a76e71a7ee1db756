"""Abstention and conformal sets of ``scalabl predict``, and ``scalabl select``."""

from __future__ import annotations

import json
import random
import re
import shlex
from pathlib import Path

import datasets
import pytest
import torch
from conftest import make_records, scalabl, write_jsonl
from omegaconf import OmegaConf
from safetensors.torch import load_file

import scalabl_pyro as sp
import scalabl_pyro.commands.predict as predict_command
from scalabl_pyro.commands._configs import CONFIGS
from scalabl_pyro.commands.predict import PredictConfig
from scalabl_pyro.commands.select import SelectConfig
from scalabl_pyro.data import read_records
from scalabl_pyro.runs.settings import build

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "decisions.md"
FAST = ["fit.steps=4", "fit.batch_size=4", "fit.lr=0.1", "fit.lr_guide=0.3", "progress=false"]


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, count in (("train", 16), ("validation", 39), ("test", 60)):
        write_jsonl(tmp_path / "data" / f"{name}.jsonl", make_records(count))
    write_jsonl(tmp_path / "in.jsonl", make_records(60, labelled=False))
    return tmp_path / "data"


@pytest.fixture
def run(local_model, data, capsys):
    """A finished run folder."""
    where = [f"model.name={local_model}", f"data.root={data}", "run_dir=run"]
    assert scalabl("train", *where, *FAST, "model.dtype=float32") == 0
    capsys.readouterr()
    return Path("run")


def predicted(capsys, *words, output="o.jsonl"):
    """What the command prints, and the lines it writes."""
    settings = ["run=run", "input=in.jsonl", f"output={output}", "progress=false", *words]
    assert scalabl("predict", *settings) == 0
    said = json.loads(capsys.readouterr().out)
    return said, [json.loads(line) for line in Path(output).read_text().splitlines()]


def validation(run):
    """The averaged probabilities that the run saved, and the labels."""
    saved = load_file(run / "predictions.safetensors")
    probabilities = saved["validation.logits"].double().softmax(-1).mean(0)
    return probabilities.tolist(), saved["validation.labels"].tolist()


def test_answers_below_a_threshold_are_marked(run, capsys):
    plain, before = predicted(capsys, output="plain.jsonl")
    assert plain == {"output": "plain.jsonl", "records": 60}
    largest = sorted(max(row["probabilities"]) for row in before)
    said, rows = predicted(capsys, f"abstain_below={largest[30]}")
    assert said == {"output": "o.jsonl", "records": 60}, "a given threshold needs no records"
    for row, old in zip(rows, before, strict=True):
        assert row == old | {"abstained": row["abstained"]}
        if max(row["probabilities"]) != largest[30]:  # of which the line has six digits
            assert row["abstained"] == (max(row["probabilities"]) < largest[30])
    assert {row["abstained"] for row in rows} == {True, False}


def test_a_risk_takes_its_threshold_from_the_validation_split(run, capsys):
    probabilities, labels = validation(run)
    ranked = sorted(
        (
            (max(p), p.index(max(p)) != label)
            for p, label in zip(probabilities, labels, strict=True)
        ),
        reverse=True,
    )
    errors = [sum(wrong for _, wrong in ranked[:k]) / k for k in range(1, 40)]
    risk = sorted(errors)[len(errors) // 2]
    k = max(k for k in range(1, 40) if errors[k - 1] <= risk)
    said, rows = predicted(capsys, f"risk={risk}")
    calibration = said["calibration"]
    assert calibration["records"] == 39
    assert calibration["abstain_below"] == pytest.approx(ranked[k - 1][0], abs=1e-6)
    assert (calibration["coverage"], calibration["risk"]) == pytest.approx((k / 39, errors[k - 1]))
    for row in rows:
        largest = max(row["probabilities"])
        if largest != pytest.approx(calibration["abstain_below"], abs=1e-6):
            assert row["abstained"] == (largest < calibration["abstain_below"])


def test_a_risk_from_few_answers_is_doubted(run, data, capsys):
    """Three errors in ten answers leave more than twice of it possible; none in 60 do not."""
    _, rows = predicted(capsys, output="plain.jsonl")
    lines = [json.loads(line) for line in Path("in.jsonl").read_text().splitlines()]
    answers = [max(range(4), key=row["probabilities"].__getitem__) for row in rows]
    order = sorted(range(60), key=lambda n: -max(rows[n]["probabilities"]))
    lines, answers = [lines[n] for n in order], [answers[n] for n in order]
    for count, errors, doubted in ((10, 3, True), (60, 0, False)):
        labels = [(c + 1) % 4 if count - n <= errors else c for n, c in enumerate(answers[:count])]
        known = [line | {"label": c} for line, c in zip(lines, labels, strict=False)]
        Path("known.jsonl").write_text("".join(json.dumps(line) + "\n" for line in known))
        words = ["risk=0.301", "calibration=known.jsonl", f"output={count}.jsonl", "progress=false"]
        assert scalabl("predict", "run=run", "input=in.jsonl", *words) == 0
        out, err = capsys.readouterr()
        assert json.loads(out)["calibration"]["coverage"] == 1.0
        assert ("10 labelled records were answered" in err) == doubted
        assert ("up to 0.61" in err) == doubted


def test_a_risk_that_no_threshold_has_is_refused(run, data, capsys):
    """All labels wrong: of the records, the least probable choice."""
    words = ["run=run", "input=in.jsonl", "output=o.jsonl", "progress=false"]
    _, rows = predicted(capsys, output="plain.jsonl")
    worst = [min(range(4), key=row["probabilities"].__getitem__) for row in rows]
    lines = [json.loads(line) for line in Path("in.jsonl").read_text().splitlines()]
    wrong = [line | {"label": c} for line, c in zip(lines, worst, strict=True)]
    Path("wrong.jsonl").write_text("".join(json.dumps(line) + "\n" for line in wrong))
    assert scalabl("predict", *words, "risk=0.5", "calibration=wrong.jsonl") == 1
    assert "no threshold on the largest probability has so few errors" in capsys.readouterr().err
    assert not list(Path().glob("o.jsonl*"))


def scores_by_hand(name, probabilities, key, *, seed=0):
    """1 − p, or the mass above and a share u of one's own, and 0.1 for each rank above."""
    if name == "lac":
        return [1 - p for p in probabilities]
    u = random.Random(f"{seed} {key}").random()
    scores = []
    for p in probabilities:
        above = [other for other in probabilities if other > p]
        scores.append(sum(above) + u * p + (0.1 * len(above) if name == "raps" else 0))
    return scores


@pytest.mark.parametrize("name", ["lac", "aps", "raps"])
def test_sets_hold_the_choices_whose_score_is_at_most_that_of_validation(run, capsys, name):
    said, rows = predicted(capsys, f"conformal={name}", "coverage=0.8")
    probabilities, labels = validation(run)
    right = sorted(
        scores_by_hand(name, p, f"calibration q{i}")[label]
        for i, (p, label) in enumerate(zip(probabilities, labels, strict=True))
    )
    threshold = right[32 - 1]  # ⌈40 · 0.8⌉ of 39
    assert said["calibration"] == {
        "records": 39,
        "conformal_threshold": pytest.approx(threshold, abs=1e-6),
    }
    sizes = set()
    for row in rows:
        scores = scores_by_hand(name, row["probabilities"], row["id"])
        near = {c for c in range(4) if abs(scores[c] - threshold) < 5e-6}  # lines have six digits
        expected = {c for c in range(4) if scores[c] <= threshold}
        assert set(row["set"]) - near == expected - near
        sizes.add(len(row["set"]))
    assert len(sizes) > 1


@pytest.mark.parametrize("method", ["scalabl", "mle"])
def test_the_seed_of_randomised_sets_makes_no_draws(local_model, data, capsys, method):
    """Of a run with a posterior over s or without one: the draws stay, and u is the seed's."""
    where = [f"model.name={local_model}", f"data.root={data}", "run_dir=run"]
    assert scalabl("train", *where, *FAST, "model.dtype=float32", f"method={method}") == 0
    capsys.readouterr()
    _, plain = predicted(capsys, output="plain.jsonl")
    words = ["conformal=aps", "coverage=0.8", "prediction.seed=1"]
    said, rows = predicted(capsys, *words)
    probabilities, labels = validation(Path("run"))
    right = sorted(
        scores_by_hand("aps", p, f"calibration q{i}", seed=1)[label]
        for i, (p, label) in enumerate(zip(probabilities, labels, strict=True))
    )
    threshold = said["calibration"]["conformal_threshold"]
    assert threshold == pytest.approx(right[32 - 1], abs=1e-6)  # ⌈40 · 0.8⌉ of 39
    for row, old in zip(rows, plain, strict=True):
        assert row["probabilities"] == old["probabilities"]
        scores = scores_by_hand("aps", row["probabilities"], row["id"], seed=1)
        near = {c for c in range(4) if abs(scores[c] - threshold) < 5e-6}  # lines have six digits
        assert set(row["set"]) - near == {c for c in range(4) if scores[c] <= threshold} - near


@pytest.mark.parametrize("words", [["conformal=aps"], ["conformal=lac", "risk=0.8"]], ids=" ".join)
def test_a_record_is_decided_on_alone_and_after_an_interruption(run, capsys, monkeypatch, words):
    _, whole = predicted(capsys, *words, output="whole.jsonl")
    settings = ["run=run", "input=in.jsonl", "output=o.jsonl", "progress=false", "batch_size=7"]
    original, calls = predict_command.predict, []

    def ends(*args, **options):
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("pulled the plug")
        return original(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(predict_command, "predict", ends)
        assert scalabl("predict", *settings, *words) == 1
    assert Path("o.jsonl.part").exists()
    assert scalabl("predict", *settings, "conformal=raps") == 1
    assert "was begun with other settings" in capsys.readouterr().err
    assert scalabl("predict", *settings, *words) == 0
    rows = [json.loads(line) for line in Path("o.jsonl").read_text().splitlines()]
    assert [row["set"] for row in rows] == [row["set"] for row in whole]
    assert [row.get("abstained") for row in rows] == [row.get("abstained") for row in whole]


def test_other_labelled_records_calibrate_where_they_are_given(run, data, capsys):
    words = ["conformal=lac", f"calibration={data / 'test.jsonl'}"]
    said, _ = predicted(capsys, *words)
    assert said["calibration"]["records"] == 60
    (data / "validation.jsonl").unlink()
    for path in data.glob("*.jsonl"):
        path.rename(path.name)
    settings = ["run=run", "input=in.jsonl", "output=n.jsonl", "conformal=lac"]
    assert scalabl("predict", *settings) == 1
    message = capsys.readouterr().err
    assert "validation split of the run cannot be read" in message
    assert "give calibration=FILE" in message
    assert scalabl("predict", *settings, "calibration=test.jsonl") == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["abstain_below=1.2"], "abstain_below is 1.2"),
        (["abstain_below=0.5", "risk=0.1"], "give one, for a risk chooses the threshold"),
        (["conformal=cap"], "conformal is 'cap': expected one of ['aps', 'lac', 'raps']"),
        (["conformal=lac", "coverage=1"], "coverage is 1.0"),
        (
            ["conformal=lac", "coverage=0.99"],
            "takes 99 labelled examples or more, and there are 39",
        ),
        (["calibration=in.jsonl"], "calibration is 'in.jsonl', which nothing needs"),
        (["coverage=0.8"], "coverage is 0.8, which is of conformal sets alone: give conformal"),
        (["prediction.weights=posterior"], "prediction.weights is 'posterior', of the tokens of"),
        (["coverage=0.8", "risk=0.5"], "coverage is 0.8, which is of conformal sets alone"),
        (["risk=0.5", "calibration=in.jsonl"], "in.jsonl: record 'q0' has no label"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_decisions_are_refused_before_any_line(run, capsys, words, message):
    assert scalabl("predict", "run=run", "input=in.jsonl", "output=o.jsonl", *words) == 1
    assert message in capsys.readouterr().err
    assert not list(Path().glob("o.jsonl*"))


@pytest.mark.parametrize("words", [["conformal=lac"], ["risk=0.9"]], ids=" ".join)
@pytest.mark.parametrize("own", [True, False])
def test_records_that_set_their_own_threshold_are_told(run, data, capsys, words, own):
    """Whatever the order of their choices, their ids, and whether their labels are given."""
    known = read_records(data / ("validation.jsonl" if own else "test.jsonl"))
    again = [sp.Record(f"x{n}", r.question, r.choices[::-1]) for n, r in enumerate(known[:5])]
    others = [sp.Record(f"y{n}", f"the red cat {n}", r.choices) for n, r in enumerate(known[:3])]
    calibration = [] if own else [f"calibration={data / 'test.jsonl'}"]
    where = ["run=run", "progress=false", *words, *calibration]
    write_jsonl(Path("mixed.jsonl"), [*again, *others])
    assert scalabl("predict", *where, "input=mixed.jsonl", "output=o.jsonl") == 0
    assert "5 of 8 records are calibration records too: " in capsys.readouterr().err
    write_jsonl(Path("new.jsonl"), others)
    assert scalabl("predict", *where, "input=new.jsonl", "output=n.jsonl") == 0
    assert "calibration records too" not in capsys.readouterr().err


def test_novelty_of_another_prior_names_what_needs_none(local_model, data, capsys):
    where = [f"model.name={local_model}", f"data.root={data}", "run_dir=run"]
    words = ["model.dtype=float32", "method.prior.name=laplace"]
    assert scalabl("train", *where, *FAST, *words) == 0
    asked = ["run=run", "input=in.jsonl", "output=o.jsonl", "count=3"]
    capsys.readouterr()
    assert scalabl("select", *asked, "by=novelty") == 1
    error = capsys.readouterr().err
    assert "novelty needs a normal one; by=entropy and unfamiliar=mahalanobis need none" in error
    assert scalabl("select", *asked, "by=entropy") == 0


def test_a_seed_of_nothing_is_refused(run, data, capsys):
    """Where no draws are made, and no score is randomised."""
    asked = ["run=run", "input=in.jsonl", "progress=false"]
    commands = [
        ["predict", *asked, "output=o.jsonl"],
        ["predict", *asked, "output=o.jsonl", "conformal=lac"],
        ["select", "run=run", "input=in.jsonl", "output=s.jsonl", "count=3"],
        ["evaluate", "run=run", f"data.root={data}", "progress=false"],
    ]
    for command in commands:
        for way, fix in (("average", "give prediction.draws"), ("median", "leave it out")):
            assert scalabl(*command, f"prediction.name={way}", "prediction.seed=3") == 1
            expected = f"prediction.seed is 3, and nothing is drawn anew: {fix}"
            assert expected in capsys.readouterr().err
    for command in commands[1:]:
        assert scalabl(*command, "prediction.draws=4", "prediction.seed=3") == 0
    # The mean makes no draws, but the sets are randomised.
    words = ["prediction.name=median", "prediction.seed=3", "conformal=raps"]
    assert scalabl("predict", *asked, "output=sets.jsonl", *words) == 0


def test_records_to_label_are_written_as_records(run, capsys):
    _, rows = predicted(capsys, output="plain.jsonl")
    scores = {row["id"]: row["mutual_information"] for row in rows}
    words = ["run=run", "input=in.jsonl", "output=chosen.jsonl", "count=7"]
    assert scalabl("select", *words) == 0
    said = json.loads(capsys.readouterr().out)
    chosen = read_records("chosen.jsonl")
    assert [scores[r.id] for r in chosen] == sorted(scores.values(), reverse=True)[:7]
    assert said["highest"] == pytest.approx(max(scores.values()), abs=2e-6)
    assert said["lowest"] == pytest.approx(scores[chosen[-1].id], abs=2e-6)
    assert (said["records"], said["by"]) == (7, "bald")
    pool = {record.id: record for record in read_records("in.jsonl")}
    assert all(record == pool[record.id] for record in chosen)
    assert scalabl("select", *words) == 1
    assert "exists" in capsys.readouterr().err


def test_files_in_another_layout_are_read_by_their_columns(run, data, capsys):
    """The same records in both layouts give the same choice of records."""
    columns = ["columns.question=stem", "columns.choices=options.text", "columns.label=gold"]
    columns += ["columns.id=ref"]
    for old, new in ((Path("in.jsonl"), "in.parquet"), (data / "test.jsonl", "known.parquet")):
        rows = [
            {
                "ref": record.id,
                "stem": record.question,
                "options": [{"text": choice} for choice in record.choices],
                "gold": None if record.label is None else "ABCD"[record.label],
            }
            for record in read_records(old)
        ]
        datasets.Dataset.from_list(rows).to_parquet(new)
    for words in (["in.parquet", "a.jsonl", *columns], ["in.jsonl", "b.jsonl"]):
        settings = ["run=run", f"input={words[0]}", f"output={words[1]}", *words[2:], "count=3"]
        assert scalabl("select", *settings) == 0
    assert read_records("a.jsonl") == read_records("b.jsonl")
    capsys.readouterr()
    settings = ["run=run", "input=in.parquet", "output=p.jsonl", "risk=0.9", *columns]
    assert scalabl("predict", *settings, "calibration=known.parquet", "progress=false") == 0
    assert json.loads(capsys.readouterr().out)["calibration"]["records"] == 60
    asked = ["run=run", "input=in.parquet", "output=o.jsonl", f"data.{columns[0]}"]
    capsys.readouterr()
    assert scalabl("predict", *asked) == 1
    assert "did you mean columns.question?" in capsys.readouterr().err


def test_novelty_reads_the_training_data_of_the_run(run, data, capsys):
    words = ["run=run", "input=in.jsonl", "count=3", "by=novelty"]
    assert scalabl("select", *words, "output=chosen.jsonl") == 0
    said = json.loads(capsys.readouterr().out)
    trained = sp.load_run(run)
    train, pool = (trained.encode(read_records(f)) for f in (data / "train.jsonl", "in.jsonl"))
    loc = trained.guide.median()["s"]
    scores = sp.novelty(trained.model, train, pool, loc=loc)
    best = scores.topk(3)
    assert [r.id for r in read_records("chosen.jsonl")] == [f"q{n}" for n in best.indices.tolist()]
    assert said["highest"] == pytest.approx(float(best.values[0]), rel=1e-4)

    write_jsonl(data / "train.jsonl", make_records(16)[:15])
    assert scalabl("select", *words, "output=o.jsonl") == 1
    assert "its data settings lead to 15 other records" in capsys.readouterr().err
    (data / "train.jsonl").unlink()
    assert scalabl("select", *words, "output=o.jsonl") == 1
    assert "the train split of the run cannot be read: there is no split" in capsys.readouterr().err
    assert not Path("o.jsonl").exists()


def test_records_that_are_not_the_runs_calibrate_nothing(run, data, capsys):
    """As many as there were, at the same place."""
    lines = (data / "validation.jsonl").read_text().splitlines()
    others = [json.loads(line) for line in lines]
    others[0]["label"] = 3 - others[0]["label"]
    write = "".join(json.dumps(row) + "\n" for row in others)
    (data / "validation.jsonl").write_text(write)
    settings = ["run=run", "input=in.jsonl", "output=n.jsonl", "conformal=lac"]
    assert scalabl("predict", *settings) == 1
    message = capsys.readouterr().err
    assert "its data settings lead to 39 other records" in message
    assert not list(Path().glob("n.jsonl*"))


def test_thresholds_are_of_the_predictor_that_answers(run, capsys):
    """With a tolerance both stop drawing early."""
    thresholds = []
    for number, words in enumerate(([], ["prediction.tolerance=0.4"])):
        said, rows = predicted(
            capsys, "conformal=lac", "prediction.draws=16", *words, output=f"{number}.jsonl"
        )
        thresholds.append(said["calibration"]["conformal_threshold"])
    assert rows[0]["draws"] < 16
    assert thresholds[0] != thresholds[1]


def test_a_run_without_s_has_no_novelty(local_model, data, capsys):
    where = [f"model.name={local_model}", f"data.root={data}", "run_dir=mle", "method=mle"]
    assert scalabl("train", *where, *FAST, "model.dtype=float32") == 0
    words = ["run=mle", "input=in.jsonl", "output=o.jsonl", "count=3", "by=novelty"]
    assert scalabl("select", *words) == 1
    assert "method mle has no posterior over s: use by=entropy" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["count=61"], "count is 61, but of 60 records 60 have no label"),
        (["count=0"], "count is 0"),
        (["count=3", "by=luck"], "by is 'luck': expected one of"),
    ],
)
def test_bad_selections_are_refused(run, capsys, words, message):
    assert scalabl("select", "run=run", "input=in.jsonl", "output=o.jsonl", *words) == 1
    assert message in capsys.readouterr().err
    assert not Path("o.jsonl").exists()


@pytest.mark.parametrize(("name", "kind"), [("predict", PredictConfig), ("select", SelectConfig)])
def test_the_configurations_hold_the_defaults(name, kind):
    values = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{name}.yaml"))
    values.pop("defaults")
    values |= dict(run="a", input="b", output="c")
    count = {"count": 4} if name == "select" else {}
    assert build(kind, values | count) == kind("a", "b", "c", **count)


def test_scores_of_one_draw_select_by_entropy(run, capsys):
    words = ["run=run", "input=in.jsonl", "count=3", "prediction.name=median"]
    assert scalabl("select", *words, "output=o.jsonl") == 1
    assert "use by='entropy'" in capsys.readouterr().err
    assert scalabl("select", *words, "output=o.jsonl", "by=entropy") == 0
    assert torch.isfinite(torch.tensor(json.loads(capsys.readouterr().out)["highest"]))


def test_the_commands_of_the_documentation_run(run, capsys):
    """On a run folder of that name."""
    Path("runs").mkdir()
    run.rename("runs/mine")
    Path("in.jsonl").rename("questions.jsonl")
    blocks = re.findall(r"```bash\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines()]
    assert len(commands) == 5
    for command in commands:
        # So little training leaves few errors out, whatever the threshold.
        words = shlex.split(command.replace("risk=0.2", "risk=0.8"))
        assert words.pop(0) == "scalabl"
        assert scalabl(*words) == 0, command
    keys = {"sure": "abstained", "at-risk": "abstained", "sets": "set"}
    for name, key in (keys | {"unfamiliar": "mahalanobis_p"}).items():
        rows = [json.loads(line) for line in Path(f"{name}.jsonl").read_text().splitlines()]
        assert all(key in row for row in rows)
    assert len(read_records("to-label.jsonl")) == 2


def test_the_snippet_of_the_documentation_decides(run, data, capsys):
    _, rows = predicted(capsys, "unfamiliar=mahalanobis")
    Path("runs").mkdir()
    run.rename("runs/mine")
    Path("in.jsonl").rename("questions.jsonl")
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    names = {}
    code = code.replace("FOLDER", str(data)).replace("risk=0.5", "risk=0.8")
    exec(compile(code, DOCUMENT.name, "exec"), names)
    assert names["abstained"].shape == (60,)
    assert names["sets"].shape == (60, 4)
    assert names["chosen"].risk <= 0.8
    assert len(names["to_label"]) == 2
    assert names["p"].tolist() == pytest.approx([row["mahalanobis_p"] for row in rows], abs=1e-5)
