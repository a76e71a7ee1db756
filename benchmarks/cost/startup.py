"""CPU seconds until ``scalabl --help`` ends, and ``import scalabl_pyro``.

    git worktree add ../before c8dfc32
    python -m benchmarks.cost.startup --against ../before --save

Each is a new process; seconds are user and system time of that process, the median over
``--repeats``. Both checkouts take turns, so that what else the machine does meets both.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks._report import report

HERE = Path(__file__).resolve().parents[2]
WORDS = {
    "scalabl --help": ["-m", "scalabl_pyro", "--help"],
    "import scalabl_pyro": ["-c", "import scalabl_pyro"],
}


def cpu_seconds(checkout: Path, words: list[str]) -> float:
    """Of one process that imports the package from a checkout."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, *words],
        env=os.environ | {"PYTHONPATH": str(checkout)},
        cwd=checkout,
        check=True,
        capture_output=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def commit(checkout: Path) -> str:
    words = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", type=Path, help="another checkout of the package")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write results/startup.json")
    args = parser.parse_args()
    checkouts = {"here": HERE} | ({"against": args.against.resolve()} if args.against else {})
    measured: dict[tuple[str, str], list[float]] = {}
    for repeat in range(args.repeats + 1):
        for what, words in WORDS.items():
            for name, checkout in checkouts.items():
                seconds = cpu_seconds(checkout, words)
                if repeat:  # the first one compiles what is not compiled yet
                    measured.setdefault((what, name), []).append(seconds)
    cpu = {
        what: {name: round(statistics.median(measured[what, name]), 3) for name in checkouts}
        for what in WORDS
    }
    figures = {"cpu_seconds": cpu, "repeats": args.repeats}
    if args.against:
        figures["against"] = commit(args.against)
    report("cost.startup", figures, save=args.save)


if __name__ == "__main__":
    main()
