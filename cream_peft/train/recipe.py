"""Parses a recipe (YAML) and the command line, strictly, into the three dataclasses of config.py."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import json
import re
import types
import typing
from pathlib import Path
from typing import Any

import yaml
from trl import TrlParser

from ..tiny import base_folder
from .config import CREAMConfig, CREAMDataArguments, CREAMModelArguments

EMBEDDED_RECIPE = base_folder().parent / "recipe.yaml"
DATACLASSES = (CREAMDataArguments, CREAMConfig, CREAMModelArguments)
# Where a run happened and with whose token is nobody's business but the user's.
PRIVATE = {"hub_token", "push_to_hub_token", "output_dir", "logging_dir", "run_name", "resume_from_checkpoint", "env"}
KINDS = {bool: "true or false", int: "a whole number", float: "a number"}
KINDS |= {str: "text", list: "a list", dict: "a mapping"}
REWORDED = (
    (r"invalid int value: (?P<value>'.*')", "{key}={value} must be a whole number"),
    (r"invalid float value: (?P<value>'.*')", "{key}={value} must be a number"),
    (r"Truthy value expected: got (?P<value>.*?) but .*", "{key}='{value}' must be true or false"),
    (r"expected .*argument", "--{key} needs a value"),
)
"""What argparse says of an argument, and what we say."""
SHOWN_CHOICES = 12
OTHER_NAMES = {
    "lora_rank": "lora_r",
    "rank": "lora_r",
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "model": "model_name_or_path",
    "base_model": "model_name_or_path",
    "dataset": "dataset_name",
}
"""What other tools call a key that is spelt too differently here to be guessed."""


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
        return {key: _plain(value) for key, value in found.items() if key not in PRIVATE}


def _plain(value: Any) -> Any:
    """A value for JSON and YAML: an enum's value, a path's last part."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items() if "token" not in str(key)}
    is_path = isinstance(value, str) and (value.startswith(("/", ".", "~")) or ("/" in value and Path(value).exists()))
    return Path(value).name if is_path else value


class _Parser(TrlParser):
    def error(self, message: str):
        # argparse would print some 300 lines of usage first, and names every option twice.
        about = re.match(r"argument --(\w+)\S*: (.*)", message, re.DOTALL)
        if about:
            key, message = about.groups()
            for pattern, line in REWORDED:
                found = re.fullmatch(pattern, message)
                if found:
                    raise RecipeError(line.format(key=key, **found.groupdict()))
            choice = re.match(r"invalid choice: '(.*)' \(choose from", message)
            if choice:
                raise _unknown_choice(key, choice[1], self._option_string_actions[f"--{key}"].choices)
            message = f"--{key}: {message}"
        raise RecipeError(message)


def _unknown_choice(key: str, value: Any, choices: Any) -> RecipeError:
    choices = [str(choice) for choice in choices]
    if len(choices) <= SHOWN_CHOICES:
        return RecipeError(f"{key}={value!r} is unknown: use one of {', '.join(choices)}")
    close = [choice for choice in choices if str(value) in choice] or difflib.get_close_matches(str(value), choices)
    hint = f"did you mean {' or '.join(close[:2])}? " if close else ""
    return RecipeError(f"{key}={value!r} is unknown: {hint}`cream-peft train --help` lists what there is")


def _unknown(names: list[str], known: list[str], what: str) -> RecipeError:
    hints = []
    for name in names:
        meant = OTHER_NAMES.get(name.removeprefix("--"))
        close = [name.replace(name.removeprefix("--"), meant)] if meant else difflib.get_close_matches(name, known, n=1)
        hints.append(repr(name) + (f" (did you mean {close[0]!r}?)" if close else ""))
    remedy = "" if all(hint.endswith("?)") for hint in hints) else "; `cream-peft train --help` lists what there is"
    return RecipeError(f"unknown {what} {', '.join(hints)}{remedy}")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecipeError(f"no such recipe: {path}") from error
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"the recipe {path} is not a text file in UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise RecipeError(f"{path} is not valid YAML{place}: {getattr(error, 'problem', error)}") from error
    if not isinstance(content, dict):
        kind = "nothing" if content is None else f"a {type(content).__name__}"
        raise RecipeError(f"the recipe {path} must hold `key: value` lines, it holds {kind}")
    return content


def _check_keys_and_types(content: dict[str, Any], parser: TrlParser) -> None:
    """Refuse what argparse lets pass in a file: unknown keys, values of another type, choices that do not exist."""
    hints = {key: hint for dataclass in DATACLASSES for key, hint in typing.get_type_hints(dataclass).items()}
    known = [field.name for dataclass in DATACLASSES for field in dataclasses.fields(dataclass)]
    unknown = [str(key) for key in content if key not in known and key != "env"]
    if unknown:
        raise _unknown(unknown, known, "key")
    choices = {action.dest: action.choices for action in parser._actions if action.choices}
    for key, value in content.items():
        if key in choices and isinstance(value, str) and value not in choices[key]:
            raise _unknown_choice(key, value, choices[key])
        # argparse converts text itself, and says where it cannot.
        if key == "env" or isinstance(value, str):
            continue
        hint = hints[key]
        parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
        kinds = {typing.get_origin(part) or part for part in parts}
        kinds |= {bool} if typing.Literal in kinds else set()
        if type(value) not in kinds and not (type(value) is int and float in kinds):
            # Lists and mappings may be written as text too, but nobody should have to.
            kinds -= {str} if kinds & {list, dict} else set()
            allowed = " or ".join(words for kind, words in KINDS.items() if kind in kinds)
            quotes = ": put it in quotes" if isinstance(value, bool | int | float) and str in kinds else ""
            raise RecipeError(f"{key}={value!r} must be {allowed}{quotes}")


def _check_flags(arguments: list[str], parser: TrlParser) -> list[str]:
    """The keys that the command line sets; options that do not exist and values that belong to none are refused."""
    options = parser._option_string_actions
    flags = [word.split("=")[0] for word in arguments if word.startswith("--")]
    unknown = [flag for flag in flags if flag not in options]
    if unknown:
        known = [option for option in options if "-" not in option.removeprefix("--")]
        raise _unknown(unknown, known, "option")
    for word in arguments:
        if word.startswith("{"):
            try:
                json.loads(word)
            except json.JSONDecodeError as error:
                raise RecipeError(f"{word} is not valid JSON: {error}") from error
    return [options[flag].dest for flag in flags]


def _split_config(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """The file that --config names, and the other arguments."""
    path, rest = None, []
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name != "--config":
            rest.append(word)
            continue
        value = value if equals else next(words, "")
        if not value or value.startswith("--"):
            raise RecipeError("--config needs a file: --config recipe.yaml")
        path = Path(value)
    return path, rest


def _in_plain_words(error: Exception, path: Path | None, flags: list[str]) -> RecipeError:
    """`error` of the parser or of a dataclass, with the recipe's name before it unless it is about a flag."""
    line = " ".join(str(error).split())
    left_over = re.search(r"not used by the HfArgumentParser: \['(.*?)'", line)
    if left_over:
        word = left_over[1]
        hint = f"did you mean --config {word}?" if word.endswith((".yaml", ".yml")) else "write --key value"
        return RecipeError(f"unexpected argument {word!r}: {hint}")
    if "support bf16" in line:
        line = "bf16=true needs a GPU that has it: leave bf16 out, it is then set as the machine can"
    about = re.match(r"(?:--)?(\w+)", line)
    return RecipeError(line if path is None or (about and about[1] in flags) else f"{path}: {line}")


def parse_recipe(arguments: list[str]) -> Recipe:
    """Parse `[--config FILE] [--field value ...]`; without --config, the embedded recipe.

    Raises:
        RecipeError: on an unreadable file, an unknown key, a value of the wrong type, or values that exclude others.
    """
    path, arguments = _split_config(list(arguments))
    content = _read_yaml(path or EMBEDDED_RECIPE)
    parser = _Parser(DATACLASSES, allow_abbrev=False)
    flags = _check_flags(arguments, parser)
    try:
        _check_keys_and_types(content, parser)
        data, run, model = parser.parse_args_and_config(["--config", str(path or EMBEDDED_RECIPE), *arguments])
    except (ValueError, TypeError, KeyError) as error:
        raise _in_plain_words(error, path, flags) from error
    return Recipe(data, run, model, [key for key in dict.fromkeys([*content, *flags]) if key != "env"])
