# SPDX-License-Identifier: Apache-2.0
"""The rules of the house, read from the source: who may import whom, and what may not appear at all.

Each rule is a function from a parsed module to its breaches. The first test runs all of them over the real tree;
the second feeds each rule a module that breaks it, so that a rule that finds nothing is known to look.
"""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("client", "models", "privacy", "server", "simulations")

MAY_IMPORT = {
    "models": {"models"},
    "privacy": {"privacy", "models"},
    "client": {"client", "privacy", "models"},
    "server": {"server", "privacy", "models"},
    "simulations": set(ROOMS),
}

# Flower changes its interfaces monthly, so only these places may know it.
FLOWER_EDGES = (
    "server/app.py",
    "privacy/bundle.py",
    "server/flower_transport.py",
    "server/runner.py",
    "server/superlink.py",
    "server/held_looks.py",
    "server/lost_answers.py",
    "server/second_delivery.py",
    "client/app.py",
    "client/runner.py",
    "client/lease.py",
    "client/lost_tasks.py",
    "client/message_bounds.py",
    "client/mutual_tls.py",
    "client/supernode.py",
    "privacy/flower_tasks.py",
    "privacy/light_layers.py",
    "privacy/wire.py",
    "privacy/wire_bytes.py",
    "simulations/engines/*.py",
    "server/control.py",
    "simulations/rehearsal.py",
    "simulations/benchmarks/*.py",
)

# Loading any of these runs code that the bytes name.
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


@dataclass(frozen=True)
class Module:
    """One source file: its path below the root, its text and tree."""

    path: PurePosixPath
    text: str

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def room(self) -> str:
        return self.path.parts[0]

    def imports(self) -> Iterator[str]:
        """Absolute names of everything imported, anywhere in the file; our own as ``fedneuro.<room>.…``."""
        package = ("fedneuro", *self.path.parent.parts)
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
                module = ".".join(filter(None, (base, node.module or "")))
                yield from (f"{module}.{alias.name}" for alias in node.names)
            elif isinstance(node, ast.Call) and _name(node.func) in ("import_module", "__import__"):
                yield from (
                    arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
                )


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _value(node: ast.expr) -> object:
    return node.value if isinstance(node, ast.Constant) else ...


def _tops(module: Module) -> set[str]:
    return {name.partition(".")[0] for name in module.imports()}


def rooms_that_may_not_meet(module: Module) -> Iterator[str]:
    for name in module.imports():
        parts = name.split(".")
        if parts[0] == "fedneuro" and len(parts) > 1 and parts[1] not in MAY_IMPORT[module.room]:
            yield f"{module.room} may not import {name}"
        if parts[0] in ROOMS or parts[0] == "tests":
            yield f"{name} would be a second copy of the module: import it relatively"


def absolute_imports_of_ourselves(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        yield from (f"import {name} relatively" for name in names if name.partition(".")[0] == "fedneuro")


def flower_beyond_its_edges(module: Module) -> Iterator[str]:
    if "flwr" in _tops(module) and not any(module.path.match(edge) for edge in FLOWER_EDGES):
        yield "imports flwr"


def opacus_outside_privacy(module: Module) -> Iterator[str]:
    # A benchmark may run beside it; nothing that a hospital runs may lean on its gradients.
    if "opacus" in _tops(module) and module.room != "privacy" and not module.path.match("simulations/benchmarks/dp.py"):
        yield "imports opacus"


def unsafe_loading(module: Module) -> Iterator[str]:
    yield from (f"imports {name}" for name in sorted(_tops(module) & UNSAFE_MODULES))
    if "torch.load" in module.imports():
        yield "imports torch.load"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and node.attr == "load" and _name(node.value) == "torch":
            yield f"line {node.lineno}: torch.load"
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and _value(node.value) is not False:
            yield f"line {node.value.lineno}: allow_pickle"


def reproducible_noise(module: Module) -> Iterator[str]:
    """MONAI's ``set_determinism`` seeds every generator, those of privacy noise with them (privacy.md, trap 8)."""
    if any(_name(node) == "set_determinism" for node in ast.walk(module.tree) if isinstance(node, ast.expr)):
        yield "calls set_determinism"


def missing_head(module: Module) -> Iterator[str]:
    if not module.text.startswith("# SPDX-License-Identifier: Apache-2.0\n"):
        yield "first line is not the SPDX line"
    if module.tree.body and not ast.get_docstring(module.tree):
        yield "no module docstring"


def missing_public_names(module: Module) -> Iterator[str]:
    assigned = {_name(t) for node in module.tree.body if isinstance(node, ast.Assign) for t in node.targets}
    private = module.path.name in ("__init__.py", "__main__.py", "cli.py", "app.py") or module.path.name.startswith("_")
    if not private and "__all__" not in assigned:
        yield "no __all__"


RULES: dict[Callable[[Module], Iterator[str]], tuple[str, str]] = {
    # rule: the path and the text of a module that breaks it
    rooms_that_may_not_meet: ("client/x.py", "from ..server.rounds import run"),
    absolute_imports_of_ourselves: ("server/x.py", "def f():\n    from fedneuro.privacy import study"),
    flower_beyond_its_edges: ("server/rounds.py", "def f():\n    import flwr.common"),
    opacus_outside_privacy: ("client/x.py", "from opacus import PrivacyEngine"),
    unsafe_loading: ("models/x.py", "import torch\nstate = torch.load('x.pt')"),
    reproducible_noise: ("client/x.py", "import monai\nmonai.utils.set_determinism(0)"),
    missing_head: ("models/x.py", "import torch"),
    missing_public_names: ("models/x.py", "x = 1"),
}

MORE_BREACHES = [
    (rooms_that_may_not_meet, "models/x.py", "from ..privacy import errors"),
    (rooms_that_may_not_meet, "models/networks/x.py", "from ...privacy import errors"),
    (rooms_that_may_not_meet, "privacy/x.py", "from .. import client"),
    (rooms_that_may_not_meet, "server/x.py", "import importlib\nimportlib.import_module('fedneuro.client.site')"),
    (rooms_that_may_not_meet, "server/x.py", "import server.rounds"),
    (flower_beyond_its_edges, "client/site.py", "import importlib\nimportlib.import_module('flwr.client')"),
    (unsafe_loading, "server/x.py", "from torch import load"),
    (unsafe_loading, "server/x.py", "import numpy as np\nnp.load('x', allow_pickle=True)"),
    (unsafe_loading, "server/x.py", "def f():\n    from pickle import loads"),
]


def modules() -> list[Module]:
    paths = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
    return [
        Module(PurePosixPath(path.relative_to(ROOT).as_posix()), path.read_text(encoding="utf-8")) for path in paths
    ]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_tree_keeps_the_rule(rule: Callable[[Module], Iterator[str]]) -> None:
    tree = modules()
    assert len(tree) > 20
    assert [f"{module.path}: {breach}" for module in tree for breach in rule(module)] == []


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [*((rule, *breach) for rule, breach in RULES.items()), *MORE_BREACHES],
)
def test_the_rule_sees_its_breach(rule: Callable[[Module], Iterator[str]], path: str, text: str) -> None:
    assert list(rule(Module(PurePosixPath(path), text)))


def test_tests_have_their_head_too() -> None:
    paths = sorted((ROOT / "tests").rglob("*.py"))
    found = [
        Module(PurePosixPath(path.relative_to(ROOT).as_posix()), path.read_text(encoding="utf-8")) for path in paths
    ]
    assert [f"{module.path}: {breach}" for module in found for breach in missing_head(module)] == []


@pytest.mark.parametrize("command", ["fedneuro.simulations.cli", "fedneuro.client.cli", "fedneuro.server.cli"])
def test_help_loads_nothing_heavy(command: str) -> None:
    """A command line that answers at once: what training needs is imported where training starts."""
    heavy = ("torch", "monai", "flwr", "ray", "opacus", "matplotlib", "nilearn", "sklearn", "scipy")
    code = f"import sys, {command}; print(*(name for name in {heavy!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == []
