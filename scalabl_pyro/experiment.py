"""One training run, from a configuration to a run folder."""

from __future__ import annotations

from .checkpoint import save_run
from .config import RunConfig
from .loading import Classes, load_readout, make_adapter
from .metrics import evaluate
from .predict import predict

__all__ = ["run"]


def run(config: RunConfig) -> dict[str, dict[str, float]]:
    """Train, predict every split but the training one, and write the run folder.

    :returns: metrics by split.
    :raises FileExistsError: if the run folder exists.
    """
    config.check_run_dir()
    splits = config.data.splits(seed=config.seed)
    classes = Classes.of(config.model, [r for records in splits.values() for r in records])
    readout = load_readout(config.model, classes)
    encoded = {name: readout.encode(records) for name, records in splits.items()}

    fitted = config.make_method().fit(
        lambda *, svd: make_adapter(config.model, config.lora, readout, svd=svd),
        encoded.pop("train"),
        encoded["validation"],
        seed=config.seed,
    )
    predictions = {
        name: predict(
            fitted.predictor, split, batch_size=config.eval_batch_size, progress=config.progress
        )
        for name, split in encoded.items()
    }
    metrics = {name: evaluate(*found) for name, found in predictions.items()}
    save_run(config, classes, fitted, metrics, predictions)
    return metrics
