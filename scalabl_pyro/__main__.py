"""``python -m scalabl_pyro``, the same as ``scalabl``."""

from .commands.cli import main

if __name__ == "__main__":
    main()
