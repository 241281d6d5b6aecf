"""What the comparisons of several recipes share: the lines of JSON of what is done, and the tables of a page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

NOT_RUN = "Not run yet."
"""The line in place of a table that has no rows."""


def read_lines(*paths: Path) -> list[dict[str, Any]]:
    """The lines of these files, as far as they exist; empty ones, and one cut off by a kill, are passed over."""
    found = []
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return found


def with_tables(text: str, tables: dict[str, list[str]]) -> str:
    """The page with the lines of each table below its mark, `<!-- table: NAME -->`, written anew."""
    for name, lines in tables.items():
        head, mark, rest = text.partition(f"<!-- table: {name} -->\n")
        if mark:
            rest = re.sub(rf"\A(\|.*\n|{NOT_RUN}\n)*", "", rest)
            text = head + mark + "".join(f"{line}\n" for line in lines) + rest
    return text
