"""The table of ``scalabl demo`` with five seeds, which the package keeps and prints.

python -m benchmarks.quality.demo --out FOLDER --save
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from benchmarks._report import report
from scalabl_pyro import embedded
from scalabl_pyro.commands._configs import CONFIGS
from scalabl_pyro.commands.compare import CompareConfig, compare
from scalabl_pyro.runs.settings import build

SEEDS = [0, 1, 2, 3, 4]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="runs/demo5", help="folder of runs; finished ones stay")
    parser.add_argument("--jobs", type=int, default=0, help="runs at a time; 0: one a core")
    parser.add_argument("--save", action="store_true", help="write scalabl_pyro/embedded/demo.json")
    args = parser.parse_args()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        settings = compose("demo", [f"out={args.out}", f"seeds={SEEDS}", f"jobs={args.jobs}"])
    config = build(CompareConfig, OmegaConf.to_container(settings, resolve=True))
    folder = Path(embedded.__file__).parent
    report("quality.demo", compare(config), save=args.save, folder=folder)


if __name__ == "__main__":
    main()
