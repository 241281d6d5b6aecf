"""The layout of the package: which way imports point, read from the source, and how large a file may grow."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import cream_peft

PACKAGE = Path(cream_peft.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
WINGS = ("train", "model", "plan", "evals", "publish", "tiny")
ALLOWED = {
    "model": {"tiny"},
    "plan": {"model", "tiny"},
    "evals": {"model", "plan", "tiny"},
    "publish": {"model", "evals", "tiny"},
    "train": {"model", "plan", "publish", "tiny"},
    "tiny": set(),
}
"""Wing -> the wings that it may import; all of them may import the modules at the top, but for cli and chat."""


def imported_by(source: str, module: str, is_package: bool = False) -> set[str]:
    """The modules of the package that `source`, the text of `module`, imports anywhere, without the package's name."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("cream_peft.") for alias in node.names if "cream_peft." in alias.name}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*start, *(node.module or "").split(".")]).strip(".")
            if node.level == 0 and not name.startswith("cream_peft"):
                continue
            name = name.removeprefix("cream_peft").strip(".")
            # `from . import rope` names a module, `from .rope import x` something in it.
            found |= {inner for alias in node.names if (inner := f"{name}.{alias.name}".strip(".")) in MODULES} or {
                name
            }
    return found


def violations(imports: dict[str, set[str]]) -> list[str]:
    """What of module -> imported modules breaks the rules."""
    wrong = []
    for module, names in imports.items():
        wing = module.split(".")[0]
        for name in names:
            other = name.split(".")[0]
            if other in ("cli", "commands", "chat") and module not in ("cli", "commands"):
                wrong.append(f"{module} imports {name}: nothing imports it")
            elif other in WINGS and wing in WINGS and other != wing and other not in ALLOWED[wing]:
                wrong.append(f"{module} imports {name}")
            elif wing == "publish" and other == "evals" and name not in ("evals.results", "evals.plots"):
                wrong.append(f"{module} imports {name}: of evals only results and plots")
            elif wing not in WINGS and other in WINGS and module in ("positions", "rope", "errors", "terminal"):
                wrong.append(f"{module} imports {name}: it lies below every wing")
    return wrong


def test_imports_point_one_way():
    imports = {
        name: imported_by(path.read_text(encoding="utf-8"), name, path.stem == "__init__")
        for name, path in MODULES.items()
    }
    assert "model.record" in imports["train.trainer"], "the imports are not read"
    assert violations(imports) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("evals.run", "from ..train.files import load_documents"),
        ("evals.run", "from .. import cli"),
        ("model.base", "from ..plan import memory"),
        ("plan.fit", "from cream_peft.publish.push import push_folder"),
        ("publish.card", "from ..evals.needle import needle"),
        ("rope", "from .model.base import load_base"),
    ],
)
def test_a_line_that_breaks_the_rules_is_found(module, line):
    assert len(violations({module: imported_by(f"def late():\n    {line}\n", module)})) == 1


def test_the_trainer_loads_no_task_of_evals():
    program = (
        "import sys, cream_peft.train.trainer; print([n for n in sys.modules if n.startswith('cream_peft.evals.')])"
    )
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    allowed = {f"cream_peft.evals.{name}" for name in ("results", "plots")}
    assert set(ast.literal_eval(loaded.splitlines()[-1])) <= allowed


def test_no_file_is_longer_than_330_lines():
    sizes = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert {name: size for name, size in sizes.items() if size > 330} == {}


def test_the_version_stands_in_one_place():
    project = (PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert cream_peft.__version__ not in project and 'attr = "cream_peft.__version__"' in project
