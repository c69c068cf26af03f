"""The shape of the project: packages in order, exact public names, the field's words."""

import ast
import importlib
import io
import re
import tokenize
from pathlib import Path

import pytest

import tokengame

PACKAGE = Path(tokengame.__file__).parent
ROOT = PACKAGE.parent
ORDER = [
    {"errors"},
    {"modules", "ranges"},
    {"config", "distributed", "files", "timing"},
    {"progress"},
    {"data"},
    {"packed"},
    {"kernels"},
    {"backbones"},
    {"backends"},
    {"game"},
    {"policies"},
    {"runtime"},
    {"baselines"},
    {"measure"},
    {"deploy"},
    {"learning"},
    {"report"},
    {"api"},
    {"cli"},
]
"""packages and modules; each imports only those before it"""


def modules():
    return {path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or not path.stem.startswith("__")}


def package_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """Dotted names below tokengame that a module imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[1:] for a in node.names if a.name.startswith("tokengame."))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tokengame":
            assert not node.level, f"{path} imports relatively"
            rest = node.module.split(".")[1:]
            yield from ([rest] if rest else [[alias.name] for alias in node.names])


def test_every_package_imports_only_those_before_it():
    rank = {name: number for number, names in enumerate(ORDER) for name in names}
    assert {package_of(path) for path in modules()} == set(rank)
    for path in modules():
        own = package_of(path)
        for imported in imports(path):
            where = f"{path.relative_to(PACKAGE)} imports {'.'.join(imported)}"
            assert imported[0] == own or rank[imported[0]] < rank[own], f"{where}, which is not before it"


def test_modules_of_a_package_import_without_circles():
    """Whatever a module imports, directly or not, never leads back to it."""
    names = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path for path in modules()
    }
    arrows = {}
    for name, path in names.items():
        found = {".".join(imported) for imported in imports(path)}
        arrows[name] = {target for target in found if target in names} - {name}

    def reachable(start):
        seen, stack = set(), list(arrows[start])
        while stack:
            name = stack.pop()
            if name not in seen:
                seen.add(name)
                stack += arrows[name]
        return seen

    circles = [name for name in names if name in reachable(name)]
    assert not circles


def test_the_documentation_has_the_table_of_packages():
    table = (ROOT / "docs" / "architecture.md").read_text()
    listed = re.findall(r"^\| ((?:`[a-z]+/?`(?:, )?)+) \|", table, re.M)
    names = [name.strip("`/") for row in listed for name in row.split(", ")]
    order = {name: number for number, group in enumerate(ORDER) for name in group}
    assert sorted(names) == sorted(order)
    assert [order[name] for name in names] == sorted(order[name] for name in names), "in the order of imports"


def test_all_is_exactly_what_is_public():
    public = {name for name in dir(tokengame) if not name.startswith("_")} - {"TYPE_CHECKING", "Any"}
    packages = set().union(*ORDER) - {"kernels"}
    assert sorted(tokengame.__all__) == sorted(public - packages)


def test_importing_prints_nothing_and_compiles_nothing():
    """No module runs anything but definitions: calls at the top level are of decorators, constants and types."""
    for path in modules():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Expr):
                assert isinstance(node.value, ast.Constant), f"{path} runs line {node.lineno} at import"


def test_package_data_is_small():
    files = (f for f in PACKAGE.rglob("*") if f.suffix not in (".pyc", ".so"))
    assert sum(f.stat().st_size for f in files if f.is_file()) <= 8 * 2**20


def test_changelog_names_the_version():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    released = re.search(r"^## (\S+)$", changelog, re.M)  # "(unreleased)" may come before it
    assert released.group(1) == tokengame.__version__


PRIVATE = re.compile(
    r"\b(looks? twice|looking twice|looked twice|second looks?|nobody|everybody|whoever|whomever|rundir|anatomy"
    r"|settles?|settled|settling|set out|written out|ruled|peek|contests?|the clock|race|heap kept|keep the heap"
    r"|heard|hears|spoken|looks at|asks|asked|no more than that|promise[sd]?|who may stay|who stays)\b",
    re.I,
)
"""words that only this project used; docs/LOG.md and the history of CHANGELOG.md keep them"""
PRIVATE_NAMES = {
    "Played", "Look", "Seen", "Memory", "Layout", "Lines", "Ranks", "Feed", "Session", "RunDir", "Whole", "ForcedKeep",
    "again", "scene", "heard", "asked", "spoken", "cuts", "looks", "forced", "watched", "feed", "ranks", "session",
    "written_out", "ruled_attention", "asked_attention", "set_out", "settle", "keep_heap", "second_look", "everybody",
}  # fmt: skip
HARMLESS = {"tests/test_architecture.py", "runs/fashion_backbone.py"}


def texts():
    """Every Python comment and docstring, and every document, as (place, text)."""
    for folder in ("tokengame", "tests", "runs", "examples"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            if name in HARMLESS:
                continue
            for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
                if token.type in (tokenize.STRING, tokenize.COMMENT):
                    yield f"{name}:{token.start[0]}", token.string
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    documents += sorted((ROOT / "csrc").iterdir()) + sorted((ROOT / "tokengame" / "assets").glob("*.html"))
    for path in documents:
        if path.name != "LOG.md":
            for number, line in enumerate(path.read_text().splitlines(), 1):
                yield f"{path.relative_to(ROOT)}:{number}", line


def test_texts_use_the_words_of_the_field():
    found = [f"{place}: {match.group()}" for place, text in texts() for match in PRIVATE.finditer(text)]
    assert not found, "\n" + "\n".join(found)


def names_in(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno


def test_names_are_those_of_the_field():
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for name, line in names_in(path)
        if name in PRIVATE_NAMES
    ]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("sentence", ["nobody asks", "images are looked at twice or a second look", "The clock ran"])
def test_private_words_are_detected(sentence):
    assert PRIVATE.search(sentence)


@pytest.mark.parametrize("path", sorted((ROOT / "runs").glob("*.py")), ids=lambda path: path.stem)
def test_runs_import_what_there_is(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tokengame"):
            module = importlib.import_module(node.module)
            for name in node.names:
                assert hasattr(module, name.name) or importlib.import_module(f"{node.module}.{name.name}")
