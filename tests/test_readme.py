"""What README says can be found: files, targets, keys, and figures in the JSON they link to."""

import dataclasses
import re
from pathlib import Path

import pytest

from cream_peft.recipe import DATACLASSES, EMBEDDED_RECIPE

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_local_link_and_recipe_in_readme_exists():
    linked = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if not target.startswith("http")]
    linked += re.findall(r"recipes/[\w./-]+\.yaml", README)
    assert linked and [target for target in linked if not (ROOT / target).exists()] == []


def test_every_make_target_in_readme_exists():
    targets = set(re.findall(r"`make ([a-z-]+)", README)) | set(re.findall(r"^make ([a-z-]+)", README, re.MULTILINE))
    defined = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= targets <= defined


def test_every_key_in_the_table_is_a_field_with_the_default_it_says():
    fields = {field.name: field for dataclass in DATACLASSES for field in dataclasses.fields(dataclass)}
    rows = re.findall(r"^\| (`[a-z_`, ]+`) \| [^|]+ \| ([^|]+) \|$", README, re.MULTILINE)
    assert len(rows) >= 9
    for names, default in rows:
        for name in re.findall(r"`([a-z_]+)`", names):
            assert name in fields
            if default.strip().startswith("`") and "max_position" not in default and "context_length" not in default:
                assert fields[name].default == default.strip(" `")


@pytest.mark.parametrize("path", [EMBEDDED_RECIPE, *sorted((ROOT / "recipes").rglob("*.yaml"))], ids=lambda p: p.stem)
def test_no_file_names_a_path_of_a_machine(path):
    assert not re.search(r"(^|[^A-Za-z0-9_.])/(home|root|work|tmp)/", path.read_text())
