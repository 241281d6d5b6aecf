"""Parses a recipe (YAML) and the command line, strictly, into the dataclasses of config.py and arguments.py."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import os
import re
import types
import typing
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml
from trl import TrlParser

from ..model.secrets import without_secrets
from ..terminal import expanded
from ..tiny import TINY_ID, base_folder
from .arguments import CREAMDataArguments, CREAMModelArguments
from .config import CREAMConfig

EMBEDDED_RECIPE = base_folder().parent / "recipe.yaml"
DATACLASSES = (CREAMDataArguments, CREAMConfig, CREAMModelArguments)
PRIVATE = {"output_dir", "logging_dir", "run_name", "resume_from_checkpoint"}
"""Keys that say where a run happened; those of tokens are left out by `without_secrets`."""
PATHS = ("config", "dataset_name", "dataset_test_split", "resume_from_checkpoint")
PATHS += ("accelerator_config", "deepspeed", "fsdp_config")
"""Keys that take a path, beside those whose names end in _dir and _path."""
KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a mapping",
}
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
REWORDED = (
    (r"argument --config: expected .*", "--config needs a file: --config recipe.yaml"),
    (r"argument --(?P<key>\w+)\S*: expected .*argument", "--{key} needs a value"),
    (r"argument --(?P<key>\w+)\S*: invalid int value: (?P<value>'.*')", "{key}={value} must be a whole number"),
    (r"argument --(?P<key>\w+)\S*: invalid float value: (?P<value>'.*')", "{key}={value} must be a number"),
    (r"argument --(?P<key>\w+)\S*: Truthy value .* got (?P<value>.*) but .*", "{key}='{value}' must be true or false"),
    (r"argument (?P<key>--\w+)\S*: (?P<text>.*)", "{key}: {text}"),
    (r".* not used by .*\['(?P<word>[^']*\.ya?ml)'.*", "unexpected argument '{word}': did you mean --config {word}?"),
    (r".* not used by .*\['(?P<word>.*?)'.*", "unexpected argument '{word}': write --key value"),
    (
        r".*load_best_model_at_end requires.*",
        "load_best_model_at_end=true needs the same eval_strategy and save_strategy, and save_steps a multiple of "
        "eval_steps: set them so, or load_best_model_at_end to false",
    ),
    (r".*support bf16.*", "bf16=true needs a GPU that has it: leave bf16 out, it is then set as the machine can"),
)
"""What the parser and the dataclasses say, and what we say."""


class RecipeError(ValueError):
    """A recipe or a command line that cannot be understood; one line says which key and what is allowed."""


@dataclasses.dataclass
class Recipe:
    """A parsed recipe: where the documents come from, the run, the model, and the keys that were set."""

    data: CREAMDataArguments
    run: CREAMConfig
    model: CREAMModelArguments
    keys: list[str]
    is_embedded: bool = False
    """Whether what was not given is of the embedded model's recipe."""

    def settings(self) -> dict[str, Any]:
        """The settings that were written down, without tokens and paths: what cream.json and the card show."""
        parts = (self.data, self.run, self.model)
        found = {key: next(getattr(p, key) for p in parts if hasattr(p, key)) for key in self.keys}
        return without_secrets({key: value for key, value in found.items() if key not in PRIVATE})


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader, which lets the last of several equal keys win, with an error in its place."""

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        lines: dict[Any, int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            name = key.tag, key.value
            if name in lines:
                told = f"{key.value} is in line {lines[name]} already: leave one of them out"
                raise yaml.MarkedYAMLError(problem=told, problem_mark=key.start_mark)
            lines[name] = key.start_mark.line + 1
        return node


class RecipeParser(TrlParser):
    """TrlParser of the three dataclasses, whose errors are exceptions: argparse prints 300 lines of usage first."""

    def __init__(self, **kwargs: Any):
        super().__init__(DATACLASSES, allow_abbrev=False, **kwargs)  # ty: ignore[invalid-argument-type] any iterable
        self.add_argument("--config", metavar="FILE", help="Recipe; default: that of the embedded model.")
        for action in self._actions:
            if action.dest in PATHS or action.dest.endswith(("_dir", "_path")):
                action.type = expanded

    def error(self, message: str):
        choice = re.match(r"argument --(\w+)\S*: invalid choice: '(.*)' \(choose from", message)
        if not choice:
            raise RecipeError(message)
        key, value = choice.groups()
        choices = [str(choice) for choice in self._option_string_actions[f"--{key}"].choices or ()]
        remedy = f"use one of {', '.join(choices)}"
        if len(choices) > SHOWN_CHOICES:
            near = [other for other in choices if value in other] or difflib.get_close_matches(value, choices)
            hint = f"did you mean {' or '.join(near[:2])}? " if near else ""
            remedy = f"{hint}`cream-peft train --help` lists what there is"
        raise RecipeError(f"{key}={value!r} is unknown: {remedy}")


def print_help() -> None:
    """All keys as options of `cream-peft train`, and its own."""
    parser = RecipeParser(prog="cream-peft train")
    parser.add_argument("--json", metavar="FILE", help="Write what came of the run as JSON.")
    parser.print_help()


def _refuse_unknown(names: list[str], known: Collection[str], what: str) -> None:
    hints = []
    for name in (name for name in names if name not in known):
        word = name.removeprefix("--")
        # Each option is there with hyphens too.
        shown = [other for other in known if "-" not in other.removeprefix("--")]
        near = [name.replace(word, OTHER_NAMES[word])] if word in OTHER_NAMES else []
        near = near or difflib.get_close_matches(name, shown, n=1)
        hints.append(f"{name!r}{f' (did you mean {near[0]!r}?)' if near else ''}")
    if hints:
        remedy = "" if all(hint.endswith("?)") for hint in hints) else "; `cream-peft train --help` lists what there is"
        raise RecipeError(f"unknown {what} {', '.join(hints)}{remedy}")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
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


def _check_type(key: str, value: Any, hint: Any) -> None:
    """Refuse a number, list or mapping of YAML where the field `key` takes another type; text is argparse's to read."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = {typing.get_origin(part) or part for part in (typing.get_args(hint) if is_union else (hint,))}
    kinds |= {bool} if typing.Literal in kinds else set()
    if type(value) in kinds or (type(value) is int and float in kinds):
        return
    # Lists and mappings may be written as text too, but nobody should have to.
    shown = [words for kind, words in KINDS.items() if kind in kinds and not (kind is str and kinds & {list, dict})]
    quotes = ": put it in quotes" if isinstance(value, bool | int | float) and shown == ["text"] else ""
    raise RecipeError(f"{key}={value!r} must be {' or '.join(shown or ['text'])}{quotes}")


def _as_options(content: dict[str, Any], parser: RecipeParser) -> list[str]:
    """The recipe as a command line: text as options, and what YAML has typed already as the parser's new defaults."""
    hints: dict[str, Any] = {"env": dict}
    for dataclass in DATACLASSES:
        found = typing.get_type_hints(dataclass)
        hints |= {field.name: found[field.name] for field in dataclasses.fields(dataclass)}
    _refuse_unknown([str(key) for key in content], hints, "key")
    for key, value in content.items():
        if not isinstance(value, str) or key == "env":
            _check_type(key, value, hints[key])
    os.environ.update({key: str(value) for key, value in content.pop("env", {}).items()})
    parser.set_defaults(**{key: value for key, value in content.items() if not isinstance(value, str)})
    return [f"--{key}={value}" for key, value in content.items() if isinstance(value, str)]


def _embedded_recipe(arguments: list[str]) -> dict[str, Any]:
    """The recipe of the embedded model, or nothing where the command line names another."""
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flags.add_argument("--model_name_or_path", "--model-name-or-path", default=TINY_ID)
    flags.add_argument("--adapter_name_or_path", "--adapter-name-or-path")
    flags.add_argument("--dataset_name", "--dataset-name", default=TINY_ID)
    flags.add_argument("--lr_scheduler_type", "--lr-scheduler-type")
    given = flags.parse_known_args(arguments)[0]
    is_embedded = given.model_name_or_path == TINY_ID and not given.adapter_name_or_path
    content = _read_yaml(EMBEDDED_RECIPE) if is_embedded else {}
    if given.dataset_name != TINY_ID:
        content.pop("dataset_config", None)
    if given.lr_scheduler_type:
        # They are of the recipe's own schedule.
        content.pop("lr_scheduler_kwargs", None)
    return content


def _under_one_name(content: dict[str, Any], flags: list[str]) -> None:
    """A flag counts for what the recipe says under the setting's other name; transformers would take the new name."""
    for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
        new = old.replace("gradient", "activation")
        for name, other in ((old, new), (new, old)):
            if name in flags:
                content.pop(other, None)
        if {old, new} <= {*content, *flags}:
            raise RecipeError(f"{new} and {old} are one setting: give it under one name")


def _in_plain_words(error: Exception, recipe: str, flags: list[str]) -> RecipeError:
    """`error` of the parser or of a dataclass, after the recipe's name unless it is about a flag."""
    if isinstance(error, json.JSONDecodeError):
        return RecipeError(f"{error.doc} is not valid JSON: {error}")
    line = " ".join(str(error).split())
    for pattern, reworded in REWORDED:
        found = re.fullmatch(pattern, line)
        if found:
            line = reworded.format(**found.groupdict())
            break
    about = re.match(r"(?:--)?(\w+)", line)
    is_of_flags = line.startswith("unexpected argument") or (about and about[1] in flags)
    return RecipeError(line if is_of_flags or not recipe else f"{recipe}: {line}")


def parse_recipe(arguments: list[str]) -> Recipe:
    """Parse `[--config FILE] [--field value ...]`; without --config, the recipe of the embedded model, for it alone.

    Raises:
        RecipeError: on an unreadable file, an unknown key, a value of the wrong type, or values that exclude others.
    """
    parser, recipe = RecipeParser(), ""
    options = parser._option_string_actions
    given = [word.split("=")[0] for word in arguments if word.startswith("--")]
    _refuse_unknown(given, options, "option")
    flags = [options[option].dest for option in given]
    try:
        path = parser.parse_known_args(arguments)[0].config
        content = _read_yaml(Path(path)) if path else _embedded_recipe(arguments)
        _under_one_name(content, flags)
        # Only now: before, the message names the file itself.
        recipe = path or ""
        keys = [key for key in dict.fromkeys([*content, *flags]) if key not in ("env", "config")]
        words = [*_as_options(content, parser), *arguments]
        data, run, model, _ = parser.parse_args_into_dataclasses(words, look_for_args_file=False)
    except (ValueError, TypeError, KeyError) as error:
        raise _in_plain_words(error, recipe, flags) from error
    # ty: ignore[invalid-argument-type] TRL names a protocol, not the classes
    return Recipe(data, run, model, keys, not recipe and bool(content))
