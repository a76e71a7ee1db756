"""Things by the name that configurations use: one factory for priors, guides and ELBOs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_type_hints

__all__ = ["check_named", "check_types", "named"]

T = TypeVar("T")


def named(
    registry: Mapping[str, Callable[..., T]], kind: str, name: str, *given: Any, **options: Any
) -> T:
    """What the entry of that name makes: ``registry[name](*given, **options)``.

    :param kind: what the registry holds, as a setting is called, such as ``prior``.
    :param given: what the caller gives, which is no setting.
    :raises ValueError: if there is no such name or option. An error inside the entry itself, a
        ``TypeError`` too, is left as it is.
    """
    check_named(registry, kind, name, *given, **options)
    return registry[name](*given, **options)


def check_named(
    registry: Mapping[str, Callable[..., Any]], kind: str, name: str, *given: Any, **options: Any
) -> None:
    """:raises ValueError: if the registry has no such name, or its entry no such option."""
    if name not in registry:
        raise ValueError(f"{kind}.name is {name!r}: expected one of {sorted(registry)}")
    signature = inspect.signature(registry[name])
    known = list(signature.parameters)[len(given) :]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    unknown = sorted(options.keys() - set(known))
    if unknown and not open_ended:
        raise ValueError(f"the {kind} {name} has no option {unknown}: expected some of {known}")
    try:
        signature.bind(*given, **options)
    except TypeError as error:
        raise ValueError(f"the {kind} {name} takes {known}: {error}") from error


def check_types(entry: Callable[..., Any], kind: str, options: Mapping[str, Any]) -> None:
    """Compare options with an entry's annotations, before there is what it needs to be made.

    :raises ValueError: if a value is of another type.
    """
    # Configurations need it; a model written by hand does without.
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    try:
        hints = get_type_hints(entry.__init__ if inspect.isclass(entry) else entry)
    except NameError:
        return  # annotations that only a type checker can read
    for option, value in options.items():
        # A model that has a config of its own takes none from here, but no option is a model.
        adapter = TypeAdapter(
            hints.get(option, Any), config=ConfigDict(arbitrary_types_allowed=True)
        )
        try:
            adapter.validate_python(value, strict=True)
        except ValidationError as error:
            message = error.errors()[0]["msg"]
            raise ValueError(f"{kind}.{option} is {value!r}: {message}") from error
