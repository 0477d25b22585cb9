"""The house: imports point down one ordered list, and no circle runs within a step of it."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Ascending. A module imports from its own step or a lower one; the longest prefix decides.
HOUSE = (
    ("errors", ("lamp_fast.errors",)),
    ("extras", ("lamp_fast.extras",)),
    ("cli", ("lamp_fast.cli",)),
    ("fields", ("lamp_fast.fields",)),
    ("files", ("lamp_fast.files", "lamp_fast.tensors", "lamp_fast.pages")),
    ("ops", ("lamp_fast.ops",)),
    ("data", ("lamp_fast.data",)),
    ("clip", ("lamp_fast.clip",)),
    ("methods", ("lamp_fast.methods",)),
    ("answers", ("lamp_fast.answers",)),
    ("runs", ("lamp_fast.runs",)),
    ("jobs", ("lamp_fast.jobs",)),
    ("classifier", ("lamp_fast.classifier",)),
    (
        "commands",
        (
            *(
                f"lamp_fast.{name}"
                for name in ("train", "evaluate", "predict", "serve", "features", "export")
            ),
            *(f"lamp_fast.{name}" for name in ("info", "cache", "pretrain", "audit")),
            "lamp_fast.data.__main__",
        ),
    ),
    ("report", ("lamp_fast.report",)),
    ("reproduce", ("lamp_fast.reproduce",)),
    ("compare", ("lamp_fast.compare",)),
    ("benchmarks", ("benchmarks",)),
)
STEP_OF = {module: number for number, (_, modules) in enumerate(HOUSE) for module in modules}

# Apart: these import nothing of ours but themselves; ops know them, and info tells of the build.
APART = ("lamp_fast._C", "lamp_fast.kernels")

# What implements an op; none of these knows another one, only the dispatcher knows them all.
IMPLEMENTATIONS = (
    "lamp_fast.ops.reference",
    "lamp_fast.ops.cpp",
    "lamp_fast.ops.cuda",
    "lamp_fast.ops.onednn",
    "lamp_fast.kernels",
)


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("lamp_fast", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_name(path): path
    for folder in ("lamp_fast", "kernels", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def within(module, folders):
    """The longest of some modules or folders that a module is or lies in; None without one."""
    found = [folder for folder in folders if f"{module}.".startswith(f"{folder}.")]
    return max(found, key=len, default=None)


def for_types_alone(node):
    """Whether a statement is ``if TYPE_CHECKING``: what it imports is never run."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imports_of(source, module, is_package, *, types=True):
    """Every module of ours that a source imports, anywhere in it, also inside functions.

    With ``types`` also what is imported for annotations alone.
    """
    found = set()
    tree = ast.parse(source)
    if not types:
        tree.body = [node for node in tree.body if not for_types_alone(node)]
    for node in ast.walk(tree):
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
    ours = {name for name in found if name.split(".")[0] in ("lamp_fast", "benchmarks")}
    return ours - {"lamp_fast", "benchmarks", module}


def arrows(*, types=True):
    return {
        module: imports_of(path.read_text(), module, path.name == "__init__.py", types=types)
        for module, path in MODULES.items()
    }


ARROWS = arrows()


def why_forbidden(importer, imported):
    """Why one module may not import another; None where it may."""
    one, other = within(importer, IMPLEMENTATIONS), within(imported, IMPLEMENTATIONS)
    if None not in (one, other) and one != other:
        return "an implementation of an op imports another one"
    one, other = within(importer, APART), within(imported, APART)
    if one is not None and one != other:
        return f"{one} stands apart"
    if other is not None:
        reached = one == other or within(importer, ("lamp_fast.ops", "lamp_fast.info"))
        return None if reached else f"{other} is reached through an op"
    lower, higher = (STEP_OF[within(module, STEP_OF)] for module in (importer, imported))
    if lower < higher:
        return f"{HOUSE[lower][0]} is below {HOUSE[higher][0]}"
    return None


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"lamp_fast"}))
def test_imports_point_down(module):
    wrong = {name: why for name in ARROWS[module] if (why := why_forbidden(module, name))}
    assert not wrong


def test_no_circle():
    """But for the package's own imports, which are lazy, and those of annotations."""
    graph = {
        module: {name for name in names if name in MODULES}
        for module, names in arrows(types=False).items()
        if module != "lamp_fast"
    }
    graphlib.TopologicalSorter(graph).prepare()


def test_every_module_has_its_step():
    everywhere = (*STEP_OF, *APART)
    assert [module for module in MODULES if not within(module, everywhere)] == ["lamp_fast"]
    named = {module for module in everywhere if module != "benchmarks"}
    assert named - MODULES.keys() == {"lamp_fast._C"}


@pytest.mark.parametrize(
    ("importer", "source", "allowed"),
    [
        ("lamp_fast.clip.towers", "from lamp_fast import ops", True),
        ("lamp_fast.clip.towers", "from lamp_fast.methods.base import Method", False),
        ("lamp_fast.clip.towers", "def f():\n    import lamp_fast.train", False),
        ("lamp_fast.clip", "from .towers import Block", True),
        ("lamp_fast.methods.zeroshot", "from .base import Method", True),
        ("lamp_fast.methods.zeroshot", "from ..train import main", False),
        ("lamp_fast.methods.zeroshot", "from lamp_fast.runs.folder import CONFIG", False),
        ("lamp_fast.methods", "from .lamp import Lamp", True),
        ("lamp_fast.fields", "from lamp_fast.files import write_json", False),
        ("lamp_fast.files", "from lamp_fast.fields import to_json", True),
        ("lamp_fast.ops", "from lamp_fast.clip import Block", False),
        ("lamp_fast.ops", "from lamp_fast.ops import dispatch, reference", True),
        ("lamp_fast.ops.reference", "from lamp_fast.errors import InputError", True),
        ("lamp_fast.ops.cpp", "from lamp_fast import _C", True),
        ("lamp_fast.ops.cpp", "from lamp_fast.ops.reference import retrieve", False),
        ("lamp_fast.clip.towers", "from lamp_fast import _C", False),
        ("lamp_fast.kernels.retrieve", "import lamp_fast.ops.cpp", False),
        ("lamp_fast.kernels.retrieve", "from lamp_fast.errors import InputError", False),
        ("lamp_fast.ops.cuda", "import lamp_fast.ops.cpp", False),
        ("lamp_fast.ops.cuda", "from lamp_fast.ops.native import address", True),
        ("lamp_fast.data.pictures", "from lamp_fast.data import catalog", True),
        ("lamp_fast.data.pictures", "from lamp_fast.runs import config", False),
        ("lamp_fast.data.__main__", "from lamp_fast.runs import config", True),
        ("lamp_fast.runs.trainer", "from lamp_fast import classifier", False),
        ("lamp_fast.answers.rules", "from lamp_fast.runs.fitted import Fitted", False),
        ("lamp_fast.runs.fitted", "from lamp_fast.answers.rules import Rules", True),
        ("lamp_fast.train", "from lamp_fast.report.page import build_page", False),
        ("lamp_fast.reproduce.plan", "from lamp_fast import train, report", True),
    ],
)
def test_the_rule_itself(importer, source, allowed):
    is_package = importer in MODULES and MODULES[importer].name == "__init__.py"
    imported = imports_of(source, importer, is_package)
    assert imported
    assert all(why_forbidden(importer, name) is None for name in imported) == allowed
