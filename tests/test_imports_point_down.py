"""Imports inside the package point down only, so that each layer can be read without those above it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import django_durable

PACKAGE = Path(django_durable.__file__).parent

# From top to bottom. Modules of one layer may import each other.
LAYERS = [
    {"admin", "checks", "testing", "management", "contrib", "apps"}
    | {"logs", "urls", "views", "templatetags", "migrations"},
    {"worker"},
    {"workflows", "steps", "handles", "primitives"},
    {"engine"},
    {"models", "querysets"},
    {"states", "exceptions", "conf", "compat", "clock", "serialization", "signals"},
]
DEPTH = {module: depth for depth, layer in enumerate(LAYERS) for module in layer}


def complaints(package: Path) -> list[str]:
    """One sentence for each import that points up, and for each module that has no layer."""
    found = []
    for path in sorted(package.rglob("*.py")):
        place = path.relative_to(package)
        module = place.parts[0].removesuffix(".py")
        if str(place) == "__init__.py":  # the public names, from everywhere
            continue
        if module not in DEPTH:
            found.append(f"{place}: give {module!r} a layer in {Path(__file__).name}")
            continue
        for line, imported in sorted(imports(path, package)):
            # What is no module of ours is a public name: it comes through the package's own __init__, from the top.
            if DEPTH.get(imported, 0) < DEPTH[module]:
                found.append(f"{place}:{line}: {module} is below {imported or package.name!r}, and may not import it")
    return found


def imports(path: Path, package: Path) -> Iterator[tuple[int, str]]:
    """Each import of the package's own modules, in functions too: its line, and the module or public name."""
    # The dotted name that one leading dot stands for.
    parent = [package.name, *path.relative_to(package).parent.parts]
    for node in executed(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = parent[: len(parent) - node.level + 1] if node.level else []
            origin = ".".join([*start, *filter(None, [node.module])])
            names = [f"{origin}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            root, *inner = name.split(".")
            if root == package.name:
                yield node.lineno, inner[0] if inner else ""


def executed(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING:`, which only a type checker reads."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for other in node.orelse:
                yield other
                yield from executed(other)
        else:
            yield node
            yield from executed(node)


def test_imports_point_down():
    assert not complaints(PACKAGE), "\n".join(complaints(PACKAGE))


def write(package: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return package


def test_the_rule_lets_pass_what_points_down(tmp_path):
    files = {
        "__init__.py": "from .workflows import workflow",
        "engine/claims.py": (
            "import json\nfrom typing import TYPE_CHECKING\n"
            "from .. import models\nfrom ..states import RunStatus\nfrom . import replay\n"
            "import pkg.exceptions\nfrom pkg.engine import context\n"
            "if TYPE_CHECKING:\n    from ..workflows import Workflow\n"
        ),
        "admin/__init__.py": "import pkg\nfrom pkg import workflow\n",
    }
    assert complaints(write(tmp_path / "pkg", files)) == []


def test_the_rule_sees_what_points_up(tmp_path):
    files = {
        "engine/__init__.py": "from ..worker.loop import run",
        "engine/claims.py": "def late():\n    from .. import workflows\n",
        "models.py": "from .engine import claims",
        "states.py": "import pkg",
        "conf.py": "from pkg import workflow",
        "worker/loop.py": (
            "from typing import TYPE_CHECKING\n"
            "if TYPE_CHECKING:\n    from ..admin import site\nelse:\n    import pkg.admin.runs\n"
        ),
        "newcomer.py": "",
    }
    assert complaints(write(tmp_path / "pkg", files)) == [
        "conf.py:1: conf is below 'workflow', and may not import it",
        "engine/__init__.py:1: engine is below 'worker', and may not import it",
        "engine/claims.py:2: engine is below 'workflows', and may not import it",
        "models.py:1: models is below 'engine', and may not import it",
        "newcomer.py: give 'newcomer' a layer in test_imports_point_down.py",
        "states.py:1: states is below 'pkg', and may not import it",
        "worker/loop.py:5: worker is below 'admin', and may not import it",
    ]
