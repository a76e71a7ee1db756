"""The page of a report: what it says, where its links go, and what it looks like in a browser."""

from __future__ import annotations

import base64
import csv
import json
import re
import shutil
import subprocess
import tomllib
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from conftest import ROOT, predictions_of, scalabl
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from scipy import stats

from scalabl_pyro.commands._report import write_report
from scalabl_pyro.commands._runs import ReportedRun
from scalabl_pyro.lora.config import AdapterConfig, ModelConfig
from scalabl_pyro.prediction import Predictions, entropy, paired_difference
from scalabl_pyro.runs import DataConfig, RunConfig
from scalabl_pyro.runs.cost import Cost, Passes

N, C = 60, 4
EVIL = "<script>alert(1)</script>"


def make_run(
    folder: Path,
    *,
    seed: int,
    method: str = "mle",
    sharp: float = 1.0,
    cost: Cost | None = None,
    splits: tuple[str, ...] = ("test",),
) -> Path:
    """A run folder of made-up predictions, as far as a report reads it."""
    config = RunConfig(
        model=ModelConfig("embedded"),
        lora=AdapterConfig(),
        data=DataConfig(task="embedded"),
        run_dir=str(folder),
        method={"name": method},
        seed=seed,
    )
    tensors = {}
    for number, split in enumerate(("validation", *splits)):
        labels = torch.arange(N) % C
        noise = torch.randn(2, N, C, generator=torch.Generator().manual_seed(seed + 10 * number))
        tensors[f"{split}.logits"] = sharp * (noise + 2 * torch.nn.functional.one_hot(labels, C))
        tensors[f"{split}.labels"] = labels
    folder.mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(asdict(config)), folder / "config.yaml")
    save_file(tensors, folder / "predictions.safetensors")
    metrics = {split: {"nll": 1.0} for split in ("validation", *splits)}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "README.md").write_text("# a run\n")
    if cost is not None:
        (folder / "cost.json").write_text(json.dumps(asdict(cost)))
    return folder


def cost(
    forward: float | None, each: float | None, *, trained: int = 100, peak: float | None = None
) -> Cost:
    back = None if each is None else 0.0
    training = Passes(forward, forward, 3.0, peak)
    return Cost(trained, 2 * trained, training, Passes(each, back, 0.004))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Three rows with two seeds each, of which one has a name that is HTML."""
    folder = tmp_path_factory.mktemp("report") / "runs"
    costs = {"mle": cost(100.0, 1.0), "ten": cost(150.0, 10.0, trained=12345), EVIL: None}
    sharp = {"mle": 1.0, "ten": 0.9, EVIL: 0.02}
    return {
        name: [
            make_run(
                folder / f"row {number} #{seed}",
                seed=seed,
                sharp=sharp[name],
                cost=costs[name],
                splits=("test", f"other {EVIL}"),
            )
            for seed in (0, 1)
        ]
        for number, name in enumerate(costs)
    }


def read(rows: dict[str, list[Path]]) -> dict[str, list[ReportedRun]]:
    return {name: [ReportedRun.read(folder) for folder in row] for name, row in rows.items()}


class Page(HTMLParser):
    """The elements of a page with their attributes, and the texts of its cells."""

    VOID = ("meta", "img", "br", "link", "input", "hr")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data

    def all(self, tag: str, attribute: str) -> list[str]:
        return [attrs[attribute] for name, attrs in self.elements if name == tag]


@pytest.fixture(scope="module")
def written(rows, tmp_path_factory):
    """The table and the page of these rows."""
    trials = {"mle": [{"trial": {"fit": {"lr": 0.5}}, "validation_nll": None, "seed": 7}]}
    out = tmp_path_factory.mktemp("out")
    table = write_report(out, read(rows), chosen={}, trials=trials)
    return table, Page(out / "report.html"), out


def test_the_page_needs_no_other_file_and_its_links_lead_somewhere(written, rows):
    _, page, out = written
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(set(ids)) == len(ids)
    seen = set()
    for link in page.all("a", "href"):
        if link.startswith("#"):
            assert link[1:] in ids
        else:
            assert (out / unquote(link)).exists()
            seen.add((out / unquote(link)).resolve())
    assert {folder.resolve() for row in rows.values() for folder in row} < seen
    assert {(out / f"table.{kind}").resolve() for kind in ("csv", "json", "md")} < seen
    names = {name for name, _ in page.elements}
    assert not names & {"script", "link", "iframe", "object"}
    text = (out / "report.html").read_text()
    assert not re.search(r"url\(|@import|src=\"(?!data:)|https?://", text)


def test_every_picture_is_whole_and_has_a_text_in_its_place(written):
    _, page, _ = written
    sources, texts = page.all("img", "src"), page.all("img", "alt")
    # Reliability on two splits, risk and coverage, entropy; two of cost, where it is known.
    assert len(sources) == 3 * 4 + 2
    for source in sources:
        picture = base64.b64decode(source.removeprefix("data:image/svg+xml;base64,"))
        assert picture.startswith(b"<?xml")
        assert picture.rstrip().endswith(b"</svg>")
    assert all(len(text) > 40 for text in texts)
    assert len(set(texts)) == len(texts)


def test_names_are_texts_and_no_html(written):
    _, page, out = written
    assert EVIL not in (out / "report.html").read_text()
    assert EVIL not in (out / "table.md").read_text()
    assert any(row and row[0] == EVIL for row in page.rows)


def test_the_best_is_marked_and_what_is_not_told_apart_from_it(written):
    table, page, _ = written
    nll = {name: table["metrics"][name]["test"]["nll"]["mean"] for name in table["metrics"]}
    best = min(nll, key=nll.get)
    nll_best = table["best"]["test"]["nll"]
    assert nll_best["row"] == best
    assert EVIL not in nll_best["not_told_apart"], "its answers are almost a guess"
    rows = {row[0]: row for row in page.rows if len(row) == 11}
    assert "★" in rows[best][3]
    assert not set("★≈") & set(rows[EVIL][3])
    (other,) = {"mle", "ten"} - {best}
    near = other in nll_best["not_told_apart"]
    assert ("≈" in rows[other][3]) == near


def test_not_told_apart_is_what_the_paired_difference_says(written, rows):
    table, _, _ = written
    loss = {}
    for name, folders in rows.items():
        runs = [predictions_of(folder)["test"] for folder in folders]
        loss[name] = torch.stack(
            [
                -run.logits.double().softmax(-1).mean(0)[torch.arange(N), run.labels].log()
                for run in runs
            ]
        )
    best = table["best"]["test"]["nll"]
    for name in rows.keys() - {best["row"]}:
        between = paired_difference(loss[name], loss[best["row"]])
        assert (between.low <= 0 <= between.high) == (name in best["not_told_apart"])


def answers(p: float, right: int) -> Predictions:
    """Each with probability p for its answer, of which so many are right."""
    labels = torch.arange(N) % C
    said = labels + (torch.arange(N) >= right)
    logits = torch.full((1, N, C), (1 - p) / (C - 1), dtype=torch.float64)
    logits[0, range(N), said % C] = p
    return Predictions(logits.log().float(), labels)


def test_the_star_of_accuracy_is_at_the_highest_and_floors_are_means_over_seeds(tmp_path, rows):
    runs, sure = read(rows)["mle"], (0.7, 0.97)
    table = write_report(
        tmp_path,
        {
            name: [
                replace(run, predictions={"test": answers(p, right)})
                for run, p in zip(runs, sure, strict=True)
            ]
            for name, right in (("worst", 20), ("best", 50), ("second", 35))
        },
        chosen={},
        trials={},
    )
    assert table["best"]["test"]["acc"]["row"] == "best"
    cells = {row[0]: row[1] for row in Page(tmp_path / "report.html").rows if len(row) == 11}
    assert {name for name, cell in cells.items() if "★" in cell} == {"best"}
    # All confidences of a seed are in one bin: how many answers are right is binomial.
    floors = [stats.binom(N, p).expect(lambda k, p=p: abs(k / N - p)) for p in sure]
    assert floors[0] > 2 * floors[1]
    for row in table["ece_floor"].values():
        assert row["test"]["mean"] == pytest.approx(sum(floors) / 2, rel=0.05)


def test_rows_of_other_records_make_no_table(tmp_path, rows):
    """Their labels are the same, and what was asked is not."""
    runs = {
        name: [replace(run, data={"test": "a", "train": str(seed)}) for seed, run in enumerate(row)]
        for name, row in read(rows).items()
    }
    for row, data, message in (
        ("ten", {"test": "b"}, r"'test' than .* #0"),
        ("mle", {"test": "b"}, r"'test' than .* #0"),  # of another seed in the same row
        ("ten", {"test": "a", "train": "0"}, r"'train' than .* #1"),  # held out by the same seed
    ):
        changed = [runs[row][0], replace(runs[row][1], name="changed", data=data), *runs[row][2:]]
        with pytest.raises(ValueError, match=f"changed had other records of {message}"):
            write_report(tmp_path, runs | {row: changed}, chosen={}, trials={})


def test_costs_are_over_plain_lora_where_both_are_counted(written):
    table, page, out = written
    rows = {row[0]: row[6:10] for row in page.rows if len(row) == 11}
    assert rows["mle"] == ["100", "200", "1×", "1×"]
    assert rows["ten"] == ["12,345", "24,690", "1.5×", "10×"]
    assert rows[EVIL] == ["–"] * 4
    with (out / "table.csv").open() as file:
        lines = {(line["method"], line["metric"]): line["mean"] for line in csv.DictReader(file)}
    assert lines["ten", "prediction_forward"] == "10.0"
    assert table["cost"][EVIL] is None


def test_where_passes_are_not_known_there_are_seconds(tmp_path):
    row = {
        name: [make_run(tmp_path / name, seed=0, cost=cost(passes, passes))]
        for name, passes in (("mle", 100.0), ("unknown", None))
    }
    write_report(tmp_path / "out", read(row), chosen={}, trials={})
    rows = {row[0]: row for row in Page(tmp_path / "out" / "report.html").rows if len(row) == 11}
    assert rows["unknown"][8:10] == ["3 s", "4 s"]
    assert rows["mle"][8:10] == ["1×", "1×"]
    assert rows["mle"][5].startswith(f"{of_test(row['mle'][0]):.3f} ± 0.")


def test_memory_is_a_column_where_a_gpu_counted_it(tmp_path):
    row = {
        name: [make_run(tmp_path / name, seed=0, cost=cost(1.0, 1.0, peak=peak))]
        for name, peak in (("mle", 3 * 2**30), ("unknown", None))
    }
    write_report(tmp_path / "out", read(row), chosen={}, trials={})
    rows = Page(tmp_path / "out" / "report.html").rows
    at = rows[0].index("training GiB")
    assert "prediction GiB" not in rows[0]
    cells = {row[0]: row[at] for row in rows if len(row) == len(rows[0])}
    assert (cells["mle"], cells["unknown"]) == ("3", "–")
    assert "training GiB |" in (tmp_path / "out" / "table.md").read_text()


def of_test(folder: Path) -> float:
    """AURC by a loop."""
    saved = load_file(folder / "predictions.safetensors")
    probs = saved["test.logits"].softmax(-1).mean(0)
    order = sorted(range(N), key=lambda n: -float(probs[n].max()))
    wrong = [int(probs[n].argmax()) != int(saved["test.labels"][n]) for n in order]
    return sum(sum(wrong[:k]) / k for k in range(1, N + 1)) / N


def test_runs_that_are_kept_nowhere_have_no_links(tmp_path, rows):
    runs = {name: [replace(run, folder=None) for run in row] for name, row in read(rows).items()}
    table = write_report(tmp_path, runs, chosen={}, trials={})
    page = Page(tmp_path / "report.html")
    files = {link for link in page.all("a", "href") if not link.startswith("#")}
    assert files == {"table.csv", "table.json", "table.md"}
    cells = [row for row in page.rows if len(row) == 11 and row[0] == "mle"]
    assert cells[0][-1] == "0 1"
    # Without costs there are no columns of dashes.
    cheap = {name: [replace(run, cost=None) for run in row] for name, row in runs.items()}
    write_report(tmp_path / "cheap", cheap, chosen={}, trials={})
    page = Page(tmp_path / "cheap" / "report.html")
    assert page.rows[0][1:] == ["ACC %", "ECE % (floor)", "NLL", "Brier", "AURC", "runs by seed"]
    assert "| trained |" not in (tmp_path / "cheap" / "table.md").read_text()
    assert table["metrics"].keys() == rows.keys()


def test_other_splits_are_told_apart_at_equal_length(tmp_path, rows):
    """Against a loop over pairs; with the number of tokens as a control, and distances of features
    for the rows whose runs all have some."""
    runs, other = read(rows), f"other {EVIL}"
    generator = torch.Generator().manual_seed(0)
    names = ("test", other)
    sizes = {s: len(runs["mle"][0].predictions[s].logits[0]) for s in names}
    tokens = {
        s: torch.randint(5 + 2 * (s == other), 14, (sizes[s],), generator=generator) for s in names
    }
    distances = {s: torch.rand(sizes[s], generator=generator) + 0.3 * (s == other) for s in names}
    runs = {n: [replace(run, tokens=tokens) for run in row] for n, row in runs.items()}
    runs["mle"] = [replace(run, mahalanobis=distances) for run in runs["mle"]]
    runs["ten"][0] = replace(runs["ten"][0], mahalanobis=distances)
    table = write_report(tmp_path, runs, chosen={}, trials={})

    def won(scores: dict[str, list[float]]) -> float:
        pairs = [
            1.0 if a > b else 0.5 if a == b else 0.0
            for a, m in zip(scores[other], tokens[other].tolist(), strict=True)
            for b, n in zip(scores["test"], tokens["test"].tolist(), strict=True)
            if abs(m - n) <= 2
        ]
        return sum(pairs) / len(pairs)

    for name, row in runs.items():
        each = [won({s: entropy(run.predictions[s].logits).tolist() for s in names}) for run in row]
        mean = table["auroc_of_entropy"][name][other]["mean"]
        assert mean == pytest.approx(sum(each) / len(each), abs=1e-9)
    control = won({s: tokens[s].tolist() for s in names})
    assert table["auroc_of_tokens"][other]["mean"] == pytest.approx(control, abs=1e-9)
    far_off = won({s: distances[s].tolist() for s in names})
    assert table["auroc_of_mahalanobis"]["mle"][other]["mean"] == pytest.approx(far_off, abs=1e-9)
    assert {name for name, row in table["auroc_of_mahalanobis"].items() if row} == {"mle"}
    page = Page(tmp_path / "report.html")
    heads = ["method", "entropy", "Mahalanobis distance", "tokens"]
    lines = page.rows[page.rows.index(heads) + 1 :][:3]
    for name, cells in zip(runs, lines, strict=True):
        assert cells[0] == name
        expected = [table["auroc_of_entropy"][name][other]["mean"], far_off, control]
        starts = [f"{value:.3f} ±" for value in expected]
        if name != "mle":
            starts[1] = "–"
        assert all(a.startswith(b) for a, b in zip(cells[1:], starts, strict=True))
    shown = (tmp_path / "table.txt").read_text()
    assert "pairs of equal length (± 2 tokens) alone count" in shown
    line = next(line for line in shown.splitlines()[::-1] if line.startswith(f"{other}  mle  "))
    assert f"{far_off:.3f} ±" in line
    assert line.rpartition("  ")[2].startswith(f"{control:.3f} ±")
    assert f"{far_off:.3f} ±" in (tmp_path / "table.md").read_text()
    # Where no two have about the same length, and of runs that do not say it, all pairs count.
    far = {
        n: [replace(r, tokens=tokens | {other: 99 + tokens[other]}) for r in row]
        for n, row in runs.items()
    }
    assert not write_report(tmp_path / "a", far, chosen={}, trials={})["auroc_of_tokens"]
    unknown = runs | {"mle": [replace(run, tokens={}) for run in runs["mle"]]}
    assert not write_report(tmp_path / "b", unknown, chosen={}, trials={})["auroc_of_tokens"]


def test_settings_and_trials_are_listed(written):
    _, page, out = written
    assert ["mle", "fit.lr=0.5", "7", "diverged"] in page.rows
    text = (out / "report.html").read_text()
    assert "<dt>fit.batch_size</dt><dd>16</dd>" in text


def test_without_other_data_there_are_no_histograms_of_them(tmp_path):
    row = {"mle": [make_run(tmp_path / "a", seed=0)]}
    write_report(tmp_path / "out", read(row), chosen={}, trials={})
    page = Page(tmp_path / "out" / "report.html")
    texts = page.all("img", "alt")
    assert [text.split(" of ")[0] for text in texts] == ["Reliability", "Risk and coverage"]
    assert not any("AUROC" in cell for line in page.rows for cell in line)


def test_the_markdown_is_a_table_of_equal_lines(written):
    _, _, out = written
    text = (out / "table.md").read_text()
    tables = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    assert len(tables) == 4
    for lines in tables:
        assert len({line.count("|") for line in lines.splitlines()}) == 1


def test_report_reads_the_trials_of_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = make_run(Path("runs/mle-seed3"), seed=3)
    trials = [{"trial": {"fit": {"lr": 0.25}}, "validation_nll": 1.25}]
    (folder / "trials.json").write_text(json.dumps(trials))
    assert scalabl("report") == 0
    assert "page: runs/report/report.html" in capsys.readouterr().out
    page = Page(Path("runs/report/report.html"))
    assert ["mle", "fit.lr=0.25", "3", "1.2500"] in page.rows
    assert "../mle-seed3/" in page.all("a", "href")


def test_runs_of_several_folders_are_one_table(tmp_path, monkeypatch, capsys):
    """The same as that of one folder that holds them all; a folder may be a run itself."""
    monkeypatch.chdir(tmp_path)
    for name, method in (("a/mle", "mle"), ("b/map", "map")):
        for seed in (0, 1):
            make_run(Path(f"{name}-seed{seed}"), seed=seed, method=method)
            shutil.copytree(f"{name}-seed{seed}", f"all/{Path(name).name}-seed{seed}")
    assert scalabl("report", "runs=all") == 0
    expected = json.loads(Path("all/report/table.json").read_text())
    for runs in ("[a,b]", "[a,b/map-seed0,b/map-seed1]"):
        assert scalabl("report", f"runs={runs}", "out=page") == 0
        assert json.loads(Path("page/table.json").read_text()) == expected
    capsys.readouterr()
    assert scalabl("report", "runs=[a,b]") == 1
    assert "runs is ['a', 'b']: give out, the folder to write" in capsys.readouterr().err
    assert scalabl("report", "runs=[a,nope]", "out=page") == 1
    assert "runs is nope: expected a folder that holds run folders" in capsys.readouterr().err
    Path("[a,b]").mkdir()
    shutil.copytree("a/mle-seed0", "[a,b]/mle-seed0")
    assert scalabl("report", "runs=[a,b]") == 0
    assert Path("[a,b]/report/report.html").exists()


def test_the_template_ships_with_the_package():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (pattern,) = pyproject["tool"]["setuptools"]["package-data"]["scalabl_pyro.commands"]
    assert [path.name for path in (ROOT / "scalabl_pyro/commands").glob(pattern)] == ["report.html"]


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2.2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return sum(w * x for w, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_texts_have_the_contrast_of_wcag_aa(written):
    _, _, out = written
    colours = dict(re.findall(r"--(\w+): (#\w{6});", (out / "report.html").read_text()))
    for ink in ("ink", "quiet", "link", "mark"):
        for ground in ("paper", "stripe"):
            light, dark = sorted(
                (luminance(colours[ink]), luminance(colours[ground])), reverse=True
            )
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, ground)


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
MEASURE = """<iframe id="page" style="width:{width}px;height:900px"></iframe><pre id="found"></pre>
<script>
const frame = document.getElementById("page");
frame.onload = () => {{
  const root = frame.contentDocument.documentElement;
  document.getElementById("found").textContent = "wide " + root.scrollWidth + " shown " +
    [...root.querySelectorAll("img")].every(image => image.naturalWidth > 0);
}};
frame.src = "report.html";
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_window(written, width, tmp_path):
    _, _, out = written
    (out / "measure.html").write_text(MEASURE.format(width=width))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--allow-file-access-from-files"]
    command += ["--virtual-time-budget=10000", f"file://{out / 'measure.html'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    measured = re.search(r"wide (\d+) shown (\w+)", done.stdout)
    assert measured is not None, done.stderr
    assert int(measured[1]) <= width
    assert measured[2] == "true"
