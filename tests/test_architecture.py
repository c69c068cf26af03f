"""The shape of the project: arrows one way, exact public names, files that can be read."""

import ast
import re
from pathlib import Path

import tokengame

PACKAGE = Path(tokengame.__file__).parent
LEVELS = [
    {"errors", "scenes", "report", "structs"},
    {"config", "hub", "ops", "promise", "ranks"},
    {"kernels", "models"},
    {"attention", "weights"},
    {"blocks", "images"},
    {"backbone"},
    {"state", "data"},
    {"decisions", "ppo", "feed"},
    {"game"},
    {"rewards", "networks", "testing"},
    {"policy", "macs", "compiled", "grid", "rollout", "whole"},
    {"looks"},
    {"train", "runtime", "baselines"},
    {"evaluate", "anatomy", "figures", "forced", "heuristics"},
    {"bench", "dynamicvit", "gallery", "finetune", "sweep"},
    {"compare", "ablate", "rundir"},
    {"loop", "console"},
    {"session"},
    {"commands"},
    {"quickstart", "contests", "pictures", "paper"},
    {"cli"},
]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tokengame"):
            module = node.module.removeprefix("tokengame").removeprefix(".")
            yield from [module] if module else [alias.name for alias in node.names]


def test_every_module_imports_only_from_levels_above_it():
    level = {name: depth for depth, names in enumerate(LEVELS) for name in names}
    for path in PACKAGE.glob("*.py"):
        if path.stem.startswith("__"):
            continue
        for imported in imports(path):
            assert level[imported] < level[path.stem], f"{path.stem} imports {imported}, which is not above it"


def test_all_is_exactly_what_is_public():
    public = {name for name in vars(tokengame) if not name.startswith("_")}
    modules = {path.stem for path in PACKAGE.glob("*.py")}
    assert sorted(tokengame.__all__) == sorted(public - modules)


def test_files_stay_readable():
    for path in PACKAGE.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 300, path.name


def test_package_data_is_small():
    assert sum(f.stat().st_size for f in PACKAGE.rglob("*") if f.suffix != ".pyc") <= 8 * 2**20


def test_changelog_names_the_version():
    changelog = (PACKAGE.parent / "CHANGELOG.md").read_text()
    assert re.search(r"^## (\S+)", changelog, re.M).group(1) == tokengame.__version__
