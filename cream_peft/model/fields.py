"""A JSON object read into the fields of a dataclass, each of them of the type that its hint says."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

DEEPEST = 20
LARGEST_NUMBER = 2**53


def known_fields(
    kind: type[Any], content: Mapping[str, Any], within: str = "", null_is_default: bool = True
) -> dict[str, Any]:
    """Of a JSON object the fields that the dataclass has; other versions may write more. What is null takes its
    default, where there is one. `within` stands before the fields' names in errors.

    Raises:
        ValueError: naming a field of another type than the dataclass has, or a number that is negative or absurd.
    """
    hints = get_type_hints(kind)
    has_default = {
        known.name: known.default is not MISSING or known.default_factory is not MISSING for known in fields(kind)
    }
    known = {key: value for key, value in content.items() if key in has_default}
    if null_is_default:
        known = {key: value for key, value in known.items() if value is not None or not has_default[key]}
    for key, value in known.items():
        if not _fits(value, hints[key]):
            wanted = getattr(hints[key], "__name__", "") if isinstance(hints[key], type) else str(hints[key])
            raise ValueError(f"{within}{key} is {shown(value)}, and must be {wanted.replace('typing.', '')}")
        if isinstance(value, int | float) and value < 0:
            raise ValueError(f"{within}{key} is {value}, and must be at least 0")
    return known


def shown(value: Any) -> str:
    """A value from a file that may be hostile, as an error shows it."""
    return text if len(text := repr(value)) <= 60 else f"{text[:57]}..."


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value that was read from JSON is of the type that a dataclass's hint asks for."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind is Any:
        return not too_deep(value)
    if kind in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if kind is Literal:
        return value in inner
    if kind in (int, float):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        # NaN is not smaller either.
        return is_number and abs(value) < LARGEST_NUMBER and (kind is float or value == int(value))
    if kind in (list, tuple):
        return isinstance(value, list) and all(_fits(one, inner[0] if inner else Any) for one in value)
    if kind is dict or is_dataclass(kind):
        return isinstance(value, dict) and all(_fits(one, inner[1] if inner else Any) for one in value.values())
    if kind is str or (isinstance(kind, type) and issubclass(kind, enum.Enum)):
        return isinstance(value, str) and "\0" not in value
    return isinstance(value, kind) if kind is not NoneType else value is None


def too_deep(value: Any, left: int = DEEPEST) -> bool:
    """Whether lists and objects lie in one another more than `left` times."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return left == 0 or any(too_deep(one, left - 1) for one in inner)
