"""Parses a recipe (YAML) and the command line, strictly, into the three dataclasses of config.py."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Any

import yaml
from trl import TrlParser

from .config import CREAMConfig, CREAMDataArguments, CREAMModelArguments

EMBEDDED_RECIPE = Path(__file__).parent / "tiny" / "recipe.yaml"
DATACLASSES = (CREAMDataArguments, CREAMConfig, CREAMModelArguments)
# Where a run happened and with whose token is nobody's business but the user's.
PRIVATE = {"hub_token", "push_to_hub_token", "output_dir", "logging_dir", "run_name", "resume_from_checkpoint", "env"}


class RecipeError(ValueError):
    """A recipe or a command line that cannot be understood; one line says which key and what is allowed."""


@dataclasses.dataclass
class Recipe:
    """A parsed recipe: where the documents come from, the run, the model, and the keys that were set."""

    data: CREAMDataArguments
    run: CREAMConfig
    model: CREAMModelArguments
    keys: list[str]

    def settings(self) -> dict[str, Any]:
        """The settings that were written down, without tokens and paths: what cream.json and the card show."""
        parts = (self.data, self.run, self.model)
        found = {key: next(getattr(p, key) for p in parts if hasattr(p, key)) for key in self.keys}
        return {key: _without_path(value) for key, value in found.items() if key not in PRIVATE}


def _without_path(value: Any) -> Any:
    is_path = isinstance(value, str) and (Path(value).is_absolute() or value.startswith((".", "~")))
    return Path(value).name if is_path else value


class _Parser(TrlParser):
    def error(self, message: str):
        # argparse would print some 300 lines of usage first.
        raise RecipeError(message)


def _known_keys() -> list[str]:
    return [field.name for dataclass in DATACLASSES for field in dataclasses.fields(dataclass)]


def _unknown(keys: list[str], where: str) -> RecipeError:
    hints = []
    for key in keys:
        close = difflib.get_close_matches(key, _known_keys(), n=1)
        hints.append(f"{key!r}" + (f" (did you mean {close[0]!r}?)" if close else ""))
    return RecipeError(f"{where}: unknown key {', '.join(hints)}")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecipeError(f"no such recipe: {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {error}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path} must hold `key: value` lines, got {type(content).__name__}")
    return content


def parse_recipe(arguments: list[str]) -> Recipe:
    """Parse `[--config FILE] [--field value ...]`; without --config, the embedded recipe.

    Raises:
        RecipeError: on an unreadable file, an unknown key, a value of the wrong type, or values that exclude others.
    """
    arguments = list(arguments)
    if "--config" in arguments:
        place = arguments.index("--config")
        if place + 1 >= len(arguments):
            raise RecipeError("--config needs a file")
        path = Path(arguments[place + 1])
        arguments = arguments[:place] + arguments[place + 2 :]
    else:
        path = EMBEDDED_RECIPE
    content = _read_yaml(path)
    unknown = [key for key in content if key not in _known_keys() and key != "env"]
    if unknown:
        raise _unknown(unknown, str(path))
    flags = [word[2:].split("=")[0] for word in arguments if word.startswith("--")]
    unknown = [flag for flag in flags if flag.removeprefix("no_") not in _known_keys()]
    if unknown:
        raise _unknown(unknown, "command line")
    parser = _Parser(DATACLASSES, allow_abbrev=False)
    try:
        data, run, model = parser.parse_args_and_config(["--config", str(path), *arguments])
    except (ValueError, TypeError, KeyError) as error:
        raise error if isinstance(error, RecipeError) else RecipeError(f"{path}: {error}") from error
    keys = [*content, *(flag.removeprefix("no_") for flag in flags)]
    return Recipe(data, run, model, list(dict.fromkeys(key for key in keys if key in _known_keys())))
