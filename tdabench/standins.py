"""Stand-ins for classes of plugins that this process does not import.

`described` turns a method or benchmark class into JSON where it was imported; `stand_in` turns
that into a class with the same declarations and parameters, whose methods cannot be called.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, NoReturn

from tdabench.benchmark import Benchmark
from tdabench.errors import TdabenchError
from tdabench.method import TDAMethod
from tdabench.params import construct

BASES: dict[str, Any] = {"method": TDAMethod, "benchmark": Benchmark}
PLAIN = {"bool": bool, "int": int, "float": float, "str": str, "None": type(None), "Any": Any}
# Class variables and the types of their values.
DECLARED: dict[str, dict[str, Any]] = {
    "method": {
        "name": str, "version": int, "family": str, "source": str, "summary": str,
        "expected_failures": dict, "check_settings": dict, "grid": dict, "query_time": tuple,
        "reads_labels": bool,
    },
    "benchmark": {
        "name": str, "version": int, "source": str, "summary": str, "title": str,
        "truth_kind": (str, type(None)), "headline": bool,
    },
}  # fmt: skip
MOST_TEXT = 100_000  # characters of a description's texts

Ask = Callable[[str, str, Mapping[str, Any]], Mapping[str, Any]]  # kind, name, parameters


# --------------------------------------------------------------------------- where it is imported


def described(kind: str, cls: Any) -> dict[str, Any]:
    """Describes a method or benchmark class ("method", "benchmark") as JSON."""
    base = BASES[kind]
    hints = typing.get_type_hints(cls)
    fields = []
    for f in dataclasses.fields(cls):
        given = f.default is not dataclasses.MISSING or (
            f.default_factory is not dataclasses.MISSING
        )
        default = f.default
        if f.default_factory is not dataclasses.MISSING:
            default = f.default_factory()
        fields.append({
            "name": f.name,
            "hint": _spelled(hints[f.name]),
            "given": given,
            "default": default if given else None,
            "changes_scores": f.metadata.get("changes_scores") is not False,
        })  # fmt: skip
    above = [c for c in cls.__mro__ if c not in (base, object) and issubclass(c, base)]
    asks = hasattr(cls, "__post_init__") or any(
        inspect.getattr_static(cls, n) is not inspect.getattr_static(base, n)
        for n in ("from_params", "params")
    )
    return {
        "class": cls.__name__,
        "declared": {n: getattr(cls, n) for n in DECLARED[kind]},
        "fields": fields,
        "docs": [str(vars(c).get("__doc__") or "")[:MOST_TEXT] for c in above],
        "asks": asks,
        "uses_models": uses_models(cls),
        "asset": getattr(cls, "asset", "") if isinstance(getattr(cls, "asset", ""), str) else "",
    }


def uses_models(cls: Any) -> bool:
    """Tells whether a method's class seems to use models, so that early imports save time.

    A guess from its source: a wrong guess costs seconds and changes nothing else.
    """
    if issubclass(cls, StandIn):
        return bool(cls.guessed)
    words = re.compile(r"torch|target|checkpoint|encoder|gradient", re.IGNORECASE)
    for c in cls.__mro__:
        if not c.__module__.startswith(("tdabench.", "builtins", "abc")):
            try:
                if words.search(inspect.getsource(c)):
                    return True
            except (OSError, TypeError):
                pass
    return False


def _spelled(hint: Any) -> Any:
    """Converts a type hint to JSON; a type that no parameter may have becomes its name."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    for name, plain in PLAIN.items():
        if hint is plain:
            return name
    if origin is Literal:
        return ["literal", *arguments]
    if origin is tuple:
        return ["tuple", *("..." if a is Ellipsis else _spelled(a) for a in arguments)]
    if origin in (typing.Union, types.UnionType):
        return ["union", *map(_spelled, arguments)]
    return ["other", getattr(hint, "__name__", str(hint))[:200]]


# --------------------------------------------------------------------------- where it is not


class StandIn:
    """Marks a class that stands for one in another process."""

    guessed: typing.ClassVar[bool] = False


def stand_in(kind: str, told: Mapping[str, Any], ask: Ask) -> Any:
    """Returns a class from its description. Raises TypeError or ValueError for a malformed one.

    `from_params` checks names and types here, and has the class itself (by `ask`) accept and
    resolve the parameters if it declares to do more than store them.
    """
    base = BASES[kind]
    space: dict[str, Any] = {"__doc__": str(told["docs"][0])[:MOST_TEXT] or None}
    for name, kinds in DECLARED[kind].items():
        value = _thawed(told["declared"][name])
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is int):
            raise TypeError(f"its {name} is of the type {type(value).__name__}")
        space[name] = value
    fields: list[tuple[str, Any, Any]] = []
    for f in told["fields"]:
        if hasattr(base, str(f["name"])):
            raise TypeError(f"its parameter {f['name']} has the name of an attribute")
        settings: dict[str, Any] = {"metadata": {} if f["changes_scores"] else {
            "changes_scores": False}}  # fmt: skip
        if f["given"]:
            settings["default"] = _thawed(f["default"])
        fields.append((str(f["name"]), _read(f["hint"]), dataclasses.field(**settings)))
    if told["asset"] and "asset" not in {f[0] for f in fields}:
        space["asset"] = str(told["asset"])
    for name in getattr(base, "__abstractmethods__", ()):
        space[name] = _absent
    if told["asks"]:

        def from_params(cls: Any, params: Mapping[str, Any]) -> Any:
            here = construct(cls, params)
            resolved = ask(kind, cls.name, {k: getattr(here, k) for k in params})
            return construct(cls, {k: _thawed(v) for k, v in resolved.items()})

        space["from_params"] = classmethod(from_params)
    space["guessed"] = bool(told["uses_models"])
    parent: Any = base
    for doc in reversed(told["docs"][1:]):  # where parameters of bases are described
        parent = type("Base", (parent,), {"__doc__": str(doc)[:MOST_TEXT], "__module__": __name__})
    return dataclasses.make_dataclass(
        str(told["class"]), fields, bases=(StandIn, parent), namespace=space, frozen=True,
        kw_only=True, eq=True,
    )  # fmt: skip


def _absent(self: Any, *arguments: Any, **named: Any) -> NoReturn:
    raise TdabenchError(f"{type(self).name} is in another process and cannot be called in this one")


def _thawed(value: Any) -> Any:
    """Converts a value from JSON: lists become tuples, within tables, too."""
    if isinstance(value, list):
        return tuple(map(_thawed, value))
    if isinstance(value, dict):
        return {str(k): _thawed(v) for k, v in value.items()}
    return value


def _read(hint: Any) -> Any:
    """Reads what `_spelled` wrote."""
    if isinstance(hint, str):
        return PLAIN[hint]
    kind, *arguments = hint
    if kind == "literal":
        return Literal[tuple(arguments)]
    if kind == "tuple":
        return tuple[tuple(... if a == "..." else _read(a) for a in arguments)]  # type: ignore[misc]
    if kind == "union":
        return functools.reduce(operator.or_, map(_read, arguments))
    return type(str(arguments[0]), (), {})
