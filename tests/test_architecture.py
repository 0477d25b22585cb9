"""Imports point one way: kernels, ops, towers, methods, entry points; leaves stand alone."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Ascending: a module imports modules of its own layer or of lower ones, never of higher ones.
LAYERS = ["leaf", "native", "op", "tower", "method", "entry"]

# The longest prefix decides. A module that nothing names is an entry point or a helper of one.
LAYER_OF = {
    "lamp_fast._C": "native",
    "lamp_fast.kernels": "native",
    "lamp_fast.ops": "op",
    "lamp_fast.errors": "leaf",
    "lamp_fast.config": "leaf",
    "lamp_fast.data": "leaf",
    "lamp_fast.data.__main__": "entry",
    "lamp_fast.memory": "leaf",
    "lamp_fast.metrics": "leaf",
    "lamp_fast.ops.reference": "leaf",
    "lamp_fast.clip": "tower",
    "lamp_fast.forest": "tower",
    "lamp_fast.tokens": "tower",
    "lamp_fast.tiny": "tower",
    "lamp_fast.methods": "method",
    "lamp_fast": "entry",
}

# What implements an op; none of these knows another one, only the dispatcher knows them all.
IMPLEMENTATIONS = (
    "lamp_fast.ops.reference",
    "lamp_fast.ops.cpp",
    "lamp_fast.ops.cuda",
    "lamp_fast.kernels",
)

# Tables of facts without code of their own.
SHARED_BY_LEAVES = ("lamp_fast.errors", "lamp_fast.data.catalog")


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("lamp_fast", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_name(path): path
    for folder in ("lamp_fast", "kernels")
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def named_by(table, module):
    """The longest dotted prefix of a module that a table names."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        if ".".join(parts[:length]) in table:
            return ".".join(parts[:length])
    raise AssertionError(f"{module} is in no layer")


def imports_of(source, module, is_package):
    """Every module of ours that a source imports, anywhere in it, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")
                above = above[: len(above) - node.level + is_package]
                base = ".".join([*above, base] if base else above)
            names = {f"{base}.{alias.name}" for alias in node.names}
            submodules = names & (MODULES.keys() | {"lamp_fast._C"})
            # `from package import submodule` runs the package only on the way to the submodule.
            found |= submodules if submodules == names else submodules | {base}
    return {name for name in found if name.split(".")[0] == "lamp_fast"} - {"lamp_fast"}


def objection(importer, imported):
    """Why one module may not import another; None where it may."""
    if importer == imported:
        return None
    one, other = named_by(LAYER_OF, importer), named_by(LAYER_OF, imported)
    lower, higher = LAYER_OF[one], LAYER_OF[other]
    if lower == "leaf" and imported not in SHARED_BY_LEAVES and one != other:
        return "a leaf imports nothing of ours beyond itself, the errors and the catalog"
    if LAYERS.index(lower) < LAYERS.index(higher):
        return f"{lower} is below {higher}"
    implementations = [
        next((name for name in IMPLEMENTATIONS if f"{module}.".startswith(f"{name}.")), None)
        for module in (importer, imported)
    ]
    if None not in implementations and implementations[0] != implementations[1]:
        return "an implementation of an op imports another one"
    return None


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    path = MODULES[module]
    imported = imports_of(path.read_text(), module, path.name == "__init__.py")
    wrong = {name: why for name in imported if (why := objection(module, name))}
    assert not wrong


def test_every_named_module_exists():
    assert LAYER_OF.keys() - MODULES.keys() == {"lamp_fast._C"}


@pytest.mark.parametrize(
    ("importer", "source", "allowed"),
    [
        ("lamp_fast.clip", "from lamp_fast import ops", True),
        ("lamp_fast.clip", "from lamp_fast.methods.base import Method", False),
        ("lamp_fast.clip", "def f():\n    import lamp_fast.train", False),
        ("lamp_fast.methods.zeroshot", "from .base import Method", True),
        ("lamp_fast.methods.zeroshot", "from ..train import main", False),
        ("lamp_fast.methods", "from .lamp import Lamp", True),
        ("lamp_fast.ops", "from lamp_fast.clip import Block", False),
        ("lamp_fast.ops", "from lamp_fast.ops import dispatch, reference", True),
        ("lamp_fast.ops.reference", "from lamp_fast.errors import InputError", True),
        ("lamp_fast.ops.reference", "from lamp_fast.ops import dispatch", False),
        ("lamp_fast.ops.cpp", "from lamp_fast import _C", True),
        ("lamp_fast.ops.cpp", "from lamp_fast.ops.reference import retrieve", False),
        ("lamp_fast.kernels.retrieve", "import lamp_fast.ops.cpp", False),
        ("lamp_fast.ops.cuda", "import lamp_fast.ops.cpp", False),
        ("lamp_fast.ops.cuda", "from lamp_fast.ops.native import address", True),
        ("lamp_fast.config", "from lamp_fast.data.digits import NAMES", False),
        ("lamp_fast.config", "from lamp_fast.data import catalog", True),
        ("lamp_fast.data.sources", "from lamp_fast.data.digits import NAMES", True),
        ("lamp_fast.train", "from lamp_fast import report, cli", True),
    ],
)
def test_the_rule_itself(importer, source, allowed):
    is_package = importer in MODULES and MODULES[importer].name == "__init__.py"
    imported = imports_of(source, importer, is_package)
    assert imported
    assert all(objection(importer, name) is None for name in imported) == allowed
