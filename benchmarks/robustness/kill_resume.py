"""kill -9 at random moments: do resumed commands end as those that ran through?

    python -m benchmarks.robustness.kill_resume --kills 20 --save

Runs ``scalabl train`` on the embedded model once without interruption, then again and again with
``resume=true``, killed at random moments, until there were so many kills; whenever a run gets to
its end, its tensors and metrics are compared with those of the first, and a new one begins. The
same for ``compare``, ``predict``, ``generate`` and ``distill`` with a fifth of the kills each; of
these, ``distill`` begins anew.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file

from benchmarks._report import report

FAST = [
    "model.name=embedded",
    "model.prompt=classes",
    "data.task=embedded",
    "lora.targets=[q_proj,v_proj]",
    "data.limit.train=200",
    "fit.batch_size=8",
    "progress=false",
]


def scalabl(*words: str, seconds: float | None = None) -> bool:
    """Whether the command ran to its end before it was killed."""
    process = subprocess.Popen(
        [sys.executable, "-m", "scalabl_pyro", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _, error = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return False
    if process.returncode:
        raise RuntimeError(
            f"scalabl {' '.join(words)} failed with status {process.returncode}: {error}"
        )
    return True


def same_run(a: Path, b: Path) -> bool:
    """Whether two run folders hold the same numbers, to the bit."""
    if (a / "metrics.json").read_text() != (b / "metrics.json").read_text():
        return False
    for name in ("projections", "posterior", "predictions"):
        left, right = (load_file(folder / f"{name}.safetensors") for folder in (a, b))
        if left.keys() != right.keys() or any(not torch.equal(left[k], right[k]) for k in left):
            return False
    return (a / "history.csv").read_bytes() == (b / "history.csv").read_bytes()


def same_adapter(a: Path, b: Path) -> bool:
    """Whether two distilled adapters are the same, to the bit."""
    left, right = (load_file(folder / "adapter_model.safetensors") for folder in (a, b))
    about = [json.loads((folder / "distilled.json").read_text()) for folder in (a, b)]
    return (
        left.keys() == right.keys()
        and all(torch.equal(left[k], right[k]) for k in left)
        and about[0] | {"output": None} == about[1] | {"output": None}
    )


def same_table(a: Path, b: Path) -> bool:
    """Whether two comparisons found the same, but for what training cost: of a resumed run that is
    not known."""
    left, right = (json.loads((path / "table.json").read_text()) for path in (a, b))
    del left["cost"], right["cost"]
    return left == right


def same_text(a: Path, b: Path) -> bool:
    return a.read_text() == b.read_text()


def kill_and_compare(
    command: list[str],
    target: Callable[[Path], list[str]],
    same: Callable[[Path, Path], bool],
    folder: Path,
    kills: int,
    chance: random.Random,
) -> dict[str, int | bool]:
    """Kill a command so often; every run that gets to its end must equal the uninterrupted one."""
    start = time.perf_counter()
    scalabl(*command, *target(folder / "whole"))
    seconds = time.perf_counter() - start
    counts = {"kills": 0, "finished_runs": 0, "equal_runs": 0}
    while counts["kills"] < kills or not counts["finished_runs"]:
        # The last run goes to its end.
        limit = chance.uniform(0, 1.2 * seconds) if counts["kills"] < kills else None
        path = folder / "killed"
        if not scalabl(*command, *target(path), seconds=limit):
            counts["kills"] += 1
            # What predict, generate and distill write is whole, and is not written again.
            if command[0] in ("train", "compare") or not path.exists():
                continue
        counts["finished_runs"] += 1
        counts["equal_runs"] += same(folder / "whole", path)
        left = [other.name for other in folder.iterdir() if other.name not in ("whole", "killed")]
        if left:
            raise RuntimeError(f"a finished run left {left} behind")
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return counts | {"bit_equal": counts["equal_runs"] == counts["finished_runs"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save", action="store_true", help="write results/kill_resume.json")
    args = parser.parse_args()
    chance = random.Random(0)
    with TemporaryDirectory() as temporary:
        root = Path(temporary)
        for name in ("train", "compare", "predict", "generate", "distill"):
            (root / name).mkdir()
        figures = {
            "train": kill_and_compare(
                ["train", *FAST, f"fit.steps={args.steps}", "checkpoint.every=5", "resume=true"],
                lambda path: [f"run_dir={path}"],
                same_run,
                root / "train",
                args.kills,
                chance,
            )
        }
        rows = ["~methods.map", "~methods.mle_tempered", "~methods.mle", "seeds=[0,1]", "jobs=1"]
        figures["compare"] = kill_and_compare(
            ["compare", *FAST, f"fit.steps={args.steps}", *rows],
            lambda path: [f"out={path}"],
            same_table,
            root / "compare",
            args.kills // 5,
            chance,
        )
        run = root / "run"
        scalabl("train", *FAST, f"fit.steps={args.steps}", f"run_dir={run}")
        questions = root / "questions.jsonl"
        write_questions(questions)
        figures["predict"] = kill_and_compare(
            ["predict", f"run={run}", f"input={questions}", "batch_size=4", "progress=false"],
            lambda path: [f"output={path}"],
            same_text,
            root / "predict",
            args.kills // 5,
            chance,
        )
        prompts = root / "prompts.jsonl"
        write_prompts(questions, prompts)
        figures["generate"] = kill_and_compare(
            ["generate", f"run={run}", f"input={prompts}", "decoding.do_sample=true",
             "decoding.max_new_tokens=8", "progress=false"],
            lambda path: [f"output={path}"],
            same_text,
            root / "generate",
            args.kills // 5,
            chance,
        )  # fmt: skip
        figures["distill"] = kill_and_compare(
            ["distill", f"run={run}", f"input={questions}", f"fit.steps={args.steps}",
             "fit.lr=1e-5", "progress=false"],
            lambda path: [f"output={path}"],
            same_adapter,
            root / "distill",
            args.kills // 5,
            chance,
        )  # fmt: skip
    bit_equal = all(part["bit_equal"] for part in figures.values())
    figures = {"kills": sum(part["kills"] for part in figures.values())} | figures
    figures["bit_equal"] = bit_equal
    report("robustness.kill_resume", figures, save=args.save)


def write_questions(path: Path) -> None:
    from scalabl_pyro.data import DataSource

    records = DataSource(task="embedded").read()["test"]
    rows = [{"id": r.id, "question": r.question, "choices": list(r.choices)} for r in records]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_prompts(questions: Path, path: Path) -> None:
    """The first 40 questions as texts to be continued."""
    rows = [json.loads(line) for line in questions.read_text().splitlines()[:40]]
    prompts = [{"id": row["id"], "prompt": row["question"]} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in prompts))


if __name__ == "__main__":
    main()
