"""Mappings of settings as frozen dataclasses, with unknown keys and wrong values refused."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from typing import Any, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

__all__ = ["ConfigError", "build", "flat", "merged", "no_setting"]

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration key that does not exist, or a value of the wrong kind."""


def flat(values: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """A nested mapping by full names, such as ``fit.lr``."""
    flattened: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, Mapping)
        flattened |= flat(value, f"{place}{key}.") if nested else {f"{place}{key}": value}
    return flattened


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes``, in nested mappings too."""
    return dict(base) | {
        key: merged(base[key], value) if isinstance(value, dict) and key in base else value
        for key, value in changes.items()
    }


def build(cls: type[T], values: Any, place: str = "") -> T:
    """An instance of a dataclass from a mapping, nested dataclasses included.

    :param place: of the mapping in a configuration, such as ``method.``, for messages.
    :raises ConfigError: if a key is unknown (the nearest one is suggested), a needed one is
        missing, or a value has the wrong type or is out of range.
    """
    _check_keys(cls, values, place)
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        raise ConfigError("; ".join(_message(e, place) for e in error.errors())) from error


def _message(error: Any, place: str) -> str:
    """What is wrong, led by the setting's full name."""
    loc = [str(part) for part in error["loc"]]
    if error["type"] == "missing":
        return f"the setting {place}{'.'.join(loc)} is missing"
    if error["type"] in ("dict_type", "mapping_type"):
        name = f"{place}{'.'.join(loc)}"
        return f"{name} is {error['input']!r}: expected a mapping, as {name}.KEY=VALUE gives"
    if error["type"] != "value_error":
        return f"{place}{'.'.join(loc)} is {error['input']!r}: {error['msg']}"
    message = str(error["msg"]).removeprefix("Value error, ")
    # A dataclass that stands in several places names its own fields alone.
    bare = re.match(r"(?!there )[\w.]+ is ", message)
    prefix = place + "".join(f"{part}." for part in loc)
    return prefix + message if bare and not message.startswith(prefix) else message


def _check_keys(cls: type, values: Mapping[str, Any], place: str) -> None:
    hints = get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls)]
    for key, value in values.items():
        if key not in known:
            raise ConfigError(no_setting(key, known, place))
        if value == "???":
            raise ConfigError(f"the setting {place}{key} is needed: give {place}{key}=…")
        if dataclasses.is_dataclass(hints[key]) and isinstance(value, Mapping):
            _check_keys(hints[key], value, f"{place}{key}.")


def no_setting(key: str, known: list[str], place: str) -> str:
    """What is wrong with a key that is unknown, with the one that is likely meant."""
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {place}{near[0]}?" if near else f"expected one of {known}"
    return f"there is no setting {place}{key}; {hint}"
