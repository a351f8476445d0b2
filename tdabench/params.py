"""Parameters of methods and benchmarks: fields of a dataclass, set by name, checked by type."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from tdabench.errors import UsageError, unknown


def construct(cls: Any, params: Mapping[str, Any]) -> Any:
    """Constructs the dataclass `cls`, which has a `name`, from parameters by name.

    Strings are converted to the field's type (`"512"` to an int). Raises UsageError for an
    unknown name or an invalid value.
    """
    known = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in params.items():
        if key not in known:
            raise unknown(f"parameter of {cls.name}", key, known)
        values[key] = convert(f"{cls.name}.{key}", value, hints[key])
    try:
        return cls(**values)
    except (ValueError, TypeError) as e:
        raise UsageError(f"{cls.name}: {e}") from e


def read_settings(text: str | Iterable[str], what: str, example: str) -> dict[str, str]:
    """Reads `"lr=1e-4,epochs=1"`, or a list of `"lr=1e-4"`, as values by name.

    A comma within a value (`lora_targets=q_proj,v_proj`) does not begin a name, and a value in
    parentheses may itself hold settings (`settings=(share=0.25,time=100)`). Raises UsageError for a
    part that is not `NAME=VALUE`, in the name of `what`, with the `example`.
    """
    parts = _split(text) if isinstance(text, str) else text
    values = {}
    for part in filter(None, (p.strip() for p in parts)):
        name, equals, value = (x.strip() for x in part.partition("="))
        if not (name and equals and value):
            raise UsageError(
                f"{what}: {part!r} does not have the form NAME=VALUE", f"Give {example}"
            )
        values[name] = value[1:-1] if value[0] == "(" and value[-1] == ")" else value
    return values


def _split(text: str) -> list[str]:
    """Splits at the commas before `NAME=` that are in no parentheses."""
    parts, depth, start = [], 0, 0
    for found in re.finditer(r"[()]|,(?=\s*\w+\s*=)", text):
        if found[0] in "()":
            depth += 1 if found[0] == "(" else -1
        elif depth == 0:
            parts.append(text[start : found.start()])
            start = found.end()
    return [*parts, text[start:]]


def convert(name: str, value: Any, hint: Any) -> Any:
    """Converts `value` to the type `hint`. Raises UsageError naming the expected type."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            if type(None) in args:
                return None
        for arm in (a for a in args if a is not type(None)):
            try:
                return convert(name, value, arm)
            except UsageError:
                continue
    elif origin is Literal:
        if value in args:
            return value
        raise UsageError(f"{name} = {value!r}", f"One of: {', '.join(map(str, args))}")
    elif origin is tuple:
        items = value.split(",") if isinstance(value, str) else value
        if isinstance(items, (list, tuple)):
            return tuple(convert(name, i, args[0]) for i in items)
    elif hint is bool:
        spelled = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in spelled:
            return spelled[value.lower()]
    elif hint in (int, float):
        integral = hint is int and isinstance(value, float) and not value.is_integer()
        if not isinstance(value, bool) and not integral:
            try:
                return hint(value)
            except (TypeError, ValueError):
                pass
    elif hint is str and isinstance(value, str):
        return value
    elif hint is Any:
        return value
    wanted = getattr(hint, "__name__", str(hint))
    raise UsageError(f"{name} = {value!r} is not of the type {wanted}")
