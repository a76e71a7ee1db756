"""Where the YAML of the commands is."""

from pathlib import Path

__all__ = ["CONFIGS"]

_PACKAGE = Path(__file__).resolve().parents[1]

#: inside the package where it is installed from a wheel, beside it in a checkout
CONFIGS = next(
    folder for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if folder.is_dir()
)
