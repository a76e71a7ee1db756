"""The words of a command as Hydra's grammar reads them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

__all__ = ["as_hydra_reads", "unreadable"]

#: settings that are texts, whatever they hold, in which Hydra would look for its own grammar
_TEXTS = ("model.template=", "model.system=")
#: those of generate, which are taken as they stand
_GIVEN = ("prompt=", "messages=")
#: those that name a file, a folder or a run, in which Hydra would look for its grammar too
_PLACES = (
    *("input=", "output=", "run=", "runs=", "run_dir=", "out=", "calibration=", "prior_run="),
    *("data.path=", "data.root=", "data.hub_path=", "model.name=", "lora.start=", "trunk_cache="),
)
#: a place that Hydra reads as it stands, or one that is quoted or refers to another setting
_PLAIN = re.compile(r"""[\w./:@%?~ +-]*|'.*'|".*"|.*\$\{.*""", re.ASCII)
#: a value of a sweep that is a function of Hydra's, such as range(1,4)
_FUNCTION = re.compile(r"[a-z]+\(.*\)", re.ASCII)
#: what is quoted, or one element of a value, between what Hydra's grammar parts them by
_ELEMENT = re.compile(
    r"""'(?:\\.|[^'])*'|"(?:\\.|[^"])*"|"""
    r"""[^\s,=:\[\]{}()'"](?:[^,=:\[\]{}()'"]*[^\s,=:\[\]{}()'"])?"""
)


def as_hydra_reads(word: str, *, sweep: bool) -> str:
    """A word of the command line, quoted where Hydra would read it as something else: a place with
    parentheses or equals signs in its name, a text, or letters that are not ASCII.

    :param sweep: whether commas part several values; else they are part of a place.
    """
    key, equals, value = word.partition("=")
    if word.startswith(_TEXTS + _GIVEN):
        return word if value == "null" else _as_text(word)
    if not equals or word.startswith("-"):
        return word
    if not word.startswith(_PLACES):
        return f"{key}={_ELEMENT.sub(_quoted_unless_ascii, value)}"
    if key == "runs" and _is_list(value):
        return f"{key}=[{','.join(map(_as_place, value[1:-1].split(',')))}]"
    if sweep and not _FUNCTION.fullmatch(value) and not _PLAIN.fullmatch(value):
        return f"{key}={','.join(map(_as_place, value.split(',')))}"
    return word if sweep else f"{key}={_as_place(value)}"


def unreadable(words: Sequence[str]) -> str | None:
    """The first word that is no override in Hydra's grammar, if there is one."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import OverrideParseException

    for word in words:
        try:
            OverridesParser.create().parse_overrides([word])
        except OverrideParseException:
            return word
    return None


def _as_place(value: str) -> str:
    return value if _PLAIN.fullmatch(value) else _quoted(value)


def _is_list(value: str) -> bool:
    """Whether it is a list of places, and no place of such a name."""
    return value[:1] == "[" and value[-1:] == "]" and not os.path.exists(value)


def _as_text(word: str) -> str:
    """A setting of which the value is a text.

    It is taken as it stands, but in a template or a system message a backslash and n are a line
    break, which shells do not make of them.
    """
    key, _, value = word.partition("=")
    if word.startswith(_TEXTS):
        for quote in ("'", '"'):  # as Hydra has it, for a shell that took its own quotes away
            if len(value) > 1 and value[0] == value[-1] == quote and quote not in value[1:-1]:
                value = value[1:-1]
        value = value.replace("\\n", "\n")
    # Not a reference to another setting.
    return f"{key}={_quoted(value.replace('${', chr(92) + '${'))}"


def _quoted_unless_ascii(element: re.Match[str]) -> str:
    text = element[0]
    return text if text.isascii() or text[0] in "'\"" else _quoted(text)


def _quoted(text: str) -> str:
    from hydra.core.override_parser.types import Quote, QuotedString

    return str(QuotedString(text, Quote.single).with_quotes())
