"""When two texts are the same: in Unicode one that looks alike can be spelled in several ways."""

from __future__ import annotations

import re
import unicodedata

__all__ = ["canonical", "comparable", "visible"]

# Default_Ignorable_Code_Point of Unicode 16: zero-width spaces and joiners, soft hyphens, marks of
# direction, byte order marks, variation selectors and such.
_INVISIBLE = re.compile(
    r"[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    r"\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3"
    r"\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)


def canonical(text: str) -> str:
    """In normal form C: "é" as one character, however it was typed."""
    return unicodedata.normalize("NFC", text)


def visible(text: str) -> str:
    """What is seen of a text: without invisible characters, white space as single blanks."""
    return " ".join(_INVISIBLE.sub("", canonical(text)).split())


def comparable(text: str) -> str:
    """The same for texts that differ in spelling alone: compatibility forms and letter case too."""
    folded = unicodedata.normalize("NFKC", visible(text)).casefold()
    # Again: folding may undo the normal form, and compatibility forms may hold blanks.
    return visible(unicodedata.normalize("NFKC", folded))
