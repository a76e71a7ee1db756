"""Methods × seeds on Ray: the runs and the table of a sequential sweep, also if a worker is killed?

    python -m benchmarks.robustness.ray_sweep --save   # needs: pip install scalabl_pyro[sweeps]

Trains the same runs on the embedded model three times: one after the other; on Ray's workers; and
on Ray's workers, one of which is killed (SIGKILL) in the middle of a run when another run is
finished. The last sweep is then given once more, and must find nothing to do.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from benchmarks._report import report
from benchmarks.robustness.kill_resume import FAST, scalabl

EVERY = 5  # steps between two checkpoints
METHODS, SEEDS = ("mle", "scalabl"), (0, 1)
RUNS = [f"{method}-seed{seed}" for method in METHODS for seed in SEEDS]


def sweep(folder: Path, steps: int, *launcher: str) -> subprocess.Popen[bytes]:
    words = [
        "train",
        "--multirun",
        *launcher,
        *FAST,
        f"method={','.join(METHODS)}",
        f"seed={','.join(map(str, SEEDS))}",
        f"fit.steps={steps}",
        "resume=true",
        f"checkpoint.every={EVERY}",
        f"checkpoint.keep={steps}",  # all, to see which are written again
        f"hydra.sweep.dir={folder}",
        f"run_dir={folder}/${{method.name}}-seed${{seed}}",
    ]
    with (folder.parent / f"{folder.name}.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "scalabl_pyro", *words], stdout=log, stderr=subprocess.STDOUT
        )


def finish(process: subprocess.Popen[bytes], folder: Path) -> None:
    if process.wait():
        raise RuntimeError((folder.parent / f"{folder.name}.log").read_text())


def table(folder: Path) -> str:
    out = folder.parent / f"{folder.name}-table"
    scalabl("report", f"runs={folder}", f"out={out}")
    contents = json.loads((out / "table.json").read_text())
    del contents["cost"]  # seconds differ
    return json.dumps(contents)


def numbers(folder: Path) -> dict[str, bytes]:
    """All that runs computed: tensors, metrics, histories."""
    files = [
        p for pattern in ("*.safetensors", "metrics.json", "*.csv") for p in folder.rglob(pattern)
    ]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def written(folder: Path, pattern: str) -> dict[str, int]:
    """When each file was written."""
    times = {}
    for path in folder.glob(pattern):
        try:
            times[str(path)] = path.stat().st_mtime_ns
        except FileNotFoundError:  # a run has just been finished
            continue
    return times


def changed(before: dict[str, int], after: dict[str, int]) -> list[str]:
    return sorted(name for name in before.keys() & after.keys() if before[name] != after[name])


def kill_worker(
    process: subprocess.Popen[bytes], folder: Path, half: int
) -> tuple[str, dict[str, int]]:
    """Once a run is finished, kill the process that trains another and has yet to reach half of it.

    :param half: of the checkpoints of a run.
    :returns: the run that was hit, and its checkpoints.
    """
    while process.poll() is None:
        for run in RUNS if written(folder, "*/metrics.json") else ():
            unfinished = folder / f"{run}.unfinished"
            checkpoints = written(unfinished, "*/step-*.safetensors")
            if not 0 < len(checkpoints) < half:
                continue
            for worker in psutil.process_iter():
                try:
                    files = {file.path for file in worker.open_files()}
                except psutil.Error:  # gone, or somebody else's
                    continue
                if str(unfinished / "lock") in files:
                    worker.kill()
                    return run, written(unfinished, "*/step-*.safetensors")
        time.sleep(0.02)
    raise RuntimeError("the sweep ended before a worker could be killed: raise --steps")


def with_a_kill(folder: Path, steps: int, *launcher: str) -> dict[str, Any]:
    process = sweep(folder, steps, *launcher)
    killed, checkpoints = kill_worker(process, folder, steps // EVERY // 2)
    finished = written(folder, "*/metrics.json")
    again: set[str] = set()
    while process.poll() is None:
        now = written(folder / f"{killed}.unfinished", "*/step-*.safetensors")
        again.update(changed(checkpoints, now))
        time.sleep(0.02)
    finish(process, folder)
    return {
        "killed_run": killed,
        "finished_before": sorted(Path(name).parent.name for name in finished),
        "recomputed_runs": changed(finished, written(folder, "*/metrics.json")),
        "checkpoints_before": len(checkpoints),
        "recomputed_checkpoints": len(again),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--save", action="store_true", help="write results/ray_sweep.json")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # as Ray sets it; sums depend on it in the last bits
    launcher = [
        "hydra/launcher=ray",
        f"+hydra.launcher.ray.init.num_cpus={args.workers}",
        "+hydra.launcher.ray.init.include_dashboard=false",
    ]
    with TemporaryDirectory() as temporary:
        sequential, ray, killed = (Path(temporary) / n for n in ("sequential", "ray", "killed"))
        finish(sweep(sequential, args.steps), sequential)
        expected = table(sequential)
        finish(sweep(ray, args.steps, *launcher), ray)
        figures: dict[str, Any] = {
            "runs": RUNS,
            "workers": args.workers,
            "table_equal": table(ray) == expected,
            "runs_bit_equal": numbers(ray) == numbers(sequential),
            "after_kill": with_a_kill(killed, args.steps, *launcher),
        }
        figures["after_kill"] |= {
            "table_equal": table(killed) == expected,
            "runs_bit_equal": numbers(killed) == numbers(sequential),
        }
        before = written(killed, "*/*")
        finish(sweep(killed, args.steps, *launcher), killed)
        figures["given_again"] = {"changed_files": changed(before, written(killed, "*/*"))}
    report("robustness.ray_sweep", figures, save=args.save)


if __name__ == "__main__":
    main()
