"""What the command line makes of an error: one line, and a file with the traceback if need be."""

from __future__ import annotations

import difflib
import re
import shlex
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

__all__ = ["explain_error", "message"]

_PACKAGE = str(Path(__file__).resolve().parents[1])
#: what Pyro adds to an error inside a model: the shapes of every site so far
_DUMP = re.compile(r"\n\s*Trace Shapes:")
#: how Hydra says that an override names no setting; it then advises a +, as some options need
_UNKNOWN_SETTING = re.compile(r"Could not override '([^']+)'")
#: how it says that a group of files, such as configs/method, has no such one, and which it has
_UNKNOWN_FILE = re.compile(
    r"Could not find '(\w+)/([^']+)'.*Available options in '\1': (.*?) Config"
)


def explain_error(error: BaseException, command: Sequence[str]) -> str:
    """The line to show, which names what went wrong and what to do.

    Errors that this package raises, or that the system has with a file, say so themselves. For any
    other, the traceback goes to a file in the folder for temporary files: the current folder may be
    what cannot be written, and commands leave nothing where they were not told to write.

    :param command: the words of the command, for that file.
    """
    text = message(error)
    foreseen = _is_foreseen(error)
    if unknown := _UNKNOWN_SETTING.match(text):
        from ._settings import similar_settings

        similar = similar_settings(unknown[1], command[1])
        if unknown[1] in similar:
            others = "method" if unknown[1].startswith("method.") else "other settings"
            text = f"there is no setting {unknown[1]} with the {others} given"
        elif similar:
            text = f"there is no setting {unknown[1]}; did you mean {' or '.join(similar)}?"
    if type(error).__name__ == "OverrideParseException":
        from ._overrides import as_hydra_reads, unreadable

        words = [as_hydra_reads(word, sweep=False) for word in command[2:] if word[:1] != "-"]
        text = (
            f"cannot read {unreadable(words) or ' '.join(words)}: quote a value that holds commas,"
            " equals signs, colons, parentheses or brackets, as in \"KEY='VALUE'\"; names of"
            " settings are of ASCII letters"
        )
    if unknown := _UNKNOWN_FILE.search(text):
        group, name, options = unknown[1], unknown[2], unknown[3].split()
        near = difflib.get_close_matches(name, options, n=1)
        hint = f"did you mean {group}={near[0]}?" if near else f"expected one of {options}"
        text = f"there is no {group} {name!r}; {hint}"
    if foreseen and not _DUMP.search(str(error)):
        return f"error: {text}"
    kind = "" if foreseen else f"{type(error).__name__}: "
    path = _write_log(error, command)
    where = f"the traceback is in {path}" if path else "the traceback could not be written"
    advice = "" if foreseen else "check the files and settings that were given, or report it; "
    return f"error: {kind}{text}; {advice}{where}"


def message(error: BaseException) -> str:
    """An error's own message, in one line if it is not ours, without what Pyro appends to it."""
    # The text of a KeyError is its key, quoted.
    whole = str(error.args[0]) if len(error.args) == 1 else str(error)
    text = _DUMP.split(whole)[0]
    ours = _raised_here(error)
    return (text if ours else " ".join(text.split())) or "no message"


def _is_foreseen(error: BaseException) -> bool:
    if isinstance(error, OSError) or type(error).__module__.startswith(("hydra.", "omegaconf.")):
        return True
    return _raised_here(error) and isinstance(error, ValueError | RuntimeError)


def _raised_here(error: BaseException) -> bool:
    frames = list(traceback.walk_tb(error.__traceback__))
    return bool(frames) and frames[-1][0].f_code.co_filename.startswith(_PACKAGE)


def _write_log(error: BaseException, command: Sequence[str]) -> str | None:
    lines = traceback.format_exception(error)
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="scalabl-error-", suffix=".log", delete=False, encoding="utf-8"
        ) as file:
            file.write(f"{shlex.join(command)}\npython {sys.version}\n\n{''.join(lines)}")
    except OSError:  # a full disk is not to hide the error itself
        return None
    return file.name
