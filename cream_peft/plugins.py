"""What a user's own package adds: position strategies, RoPE scalings, evaluation tasks. See recipes/add-your-own.md.

A package names its module under the entry point group `cream_peft.plugins`, and is imported before a command or an
import from `cream_peft`. A recipe cannot name code to run: only what was installed here runs.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

GROUP = "cream_peft.plugins"
_state = {"loaded": False}


class PluginError(ValueError):
    """A package that cannot be imported, or registers what cannot be used."""


def load_plugins() -> None:
    """Import what installed packages register, once.

    Raises:
        PluginError: naming the package that fails.
    """
    if _state["loaded"]:
        return
    # Before the packages are imported, since they import from here again.
    _state["loaded"] = True
    for entry in entry_points(group=GROUP):
        try:
            entry.load()
        except Exception as error:
            _state["loaded"] = False
            raise PluginError(
                f"{_distribution(entry)} registers {entry.value} with cream-peft, which cannot be imported "
                f"({type(error).__name__}: {error}): repair the package, or uninstall it"
            ) from error


def add(registry: dict[str, Any], kind: str, name: str, entry: Any, function: Any) -> None:
    """Put `entry`, made of `function`, into a registry. A module may replace what it added itself.

    Raises:
        PluginError: a name that is no word, or that is another module's.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise PluginError(f"{kind} {name!r}: a name has letters, digits and underscores")
    if name in registry and _home(registry[name]) != _home(entry):
        raise PluginError(f"{kind} {name!r} is registered already, by {_home(registry[name])}: choose another name")
    if not callable(function):
        raise PluginError(f"{kind} {name!r} is {function!r}, and must be a function")
    registry[name] = entry


def package_of(entry: Any) -> str | None:
    """The package that registered `entry`, with its version where it is installed; None for what is of this one."""
    top = _home(entry).split(".")[0]
    if top in ("cream_peft", "__main__"):
        return "a script or notebook" if top == "__main__" else None
    found = (_distribution(known) for known in entry_points(group=GROUP) if known.module.split(".")[0] == top)
    return next(found, top)


def _distribution(entry: Any) -> str:
    return f"{entry.dist.name} {entry.dist.version}"


def _home(entry: Any) -> str:
    """The module of a function, or of the function that a task is made of."""
    function = getattr(entry, "prompt", None) or getattr(entry, "measure", None) or entry
    # functools.partial has no module of its own.
    return getattr(function, "func", function).__module__ if entry else "cream_peft"
