"""Docstrings in Markdown, an extension of griffe: the code has reStructuredText, as Pyro's."""

from __future__ import annotations

import re
from textwrap import dedent, indent
from typing import Any

import griffe
from latex2mathml.converter import convert

MATH = re.compile(r"^( *)\.\. math::((?: .*)?\n(?:(?:\1 +.*)?\n)*)", re.MULTILINE)
ROLE = re.compile(r":(math|\w+):`(~?)([^`]+)`")
TABLE = re.compile(r"^=+(?: =+)+\n.*\n=+(?: =+)+$", re.DOTALL | re.MULTILINE)


class Markdown(griffe.Extension):
    """Formulas become MathML, which needs no script, and roles become links."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        obj.docstring.value = _markdown(obj.docstring.value)
        if isinstance(obj, griffe.Class) and "NamedTuple" in map(str, obj.bases):
            # Its fields are no parameters to griffe, which sees no __init__.
            obj.docstring.value = obj.docstring.value.replace(":param ", ":ivar ")


def _markdown(text: str) -> str:
    text = MATH.sub(_block, text + "\n")
    text = TABLE.sub(lambda match: indent(match[0], "    "), text)
    text = ROLE.sub(_role, text)
    return re.sub(r"``([^`]+)``", r"`\1`", text).replace("::\n", ":\n").rstrip()


def _block(match: re.Match[str]) -> str:
    latex = " ".join(dedent(match[2]).split())
    if "&" in latex or r"\\" in latex:
        latex = rf"\begin{{align*}} {latex} \end{{align*}}"
    return f"\n{match[1]}{convert(latex, display='block')}\n\n"


def _role(match: re.Match[str]) -> str:
    role, short, target = match.groups()
    if role == "math":
        return str(convert(target))
    if not target.startswith("scalabl_pyro."):
        return f"`{target}`"
    name = target.rpartition(".")[2] if short else target
    # What is public has a page to link to; the name alone stays of what is not.
    return f'<autoref optional identifier="{target}">`{name}`</autoref>'
