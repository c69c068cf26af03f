"""The documentation builds without a warning, its Python snippets and its notebook run, its command lines parse."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from conftest import REAL

from tokengame.cli.main import main, parse

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [page for page in PAGES if page.name not in ("LOG.md", "history.md")]
BLOCK = re.compile(r"(?:<!-- needs: (\w+) -->\n)?```(\w+)\n(.*?)^```", re.M | re.S)


def blocks(language):
    """(name, what it needs, text) of every fenced block."""
    for page in PAGES:
        for number, match in enumerate(BLOCK.finditer(page.read_text())):
            if match.group(2) == language:
                yield pytest.param(match.group(1), match.group(3), id=f"{page.name}-{number}")


def test_pages_build_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="pip install tokengame[docs]")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "api" / "index.html").read_text()
    assert "Make a trained Vision Transformer faster." in page, "docstrings are rendered"


def test_no_page_is_unfinished():
    for page in PAGES:
        assert not re.search(r"@[A-Z_]+@|TODO", page.read_text()), page.name


def test_the_first_page_is_short():
    words = re.sub(r"^```.*?^```", "", (ROOT / "README.md").read_text(), flags=re.M | re.S).split()
    assert len(words) <= 700


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory):
    """A folder in which `tokengame quickstart` has run, if briefly."""
    folder = tmp_path_factory.mktemp("docs")
    flags = ["--updates", "2", "--batch-size", "8", "--eval-images", "16", "--gmacs-ratio", "0.7"]
    assert main(["quickstart", *flags, "--output", str(folder / "quickstart")]) == 0
    return folder


@pytest.fixture
def download(monkeypatch):
    """The model hub, as far as the pages need it: weights that lie on this machine."""
    weights = REAL / "vit_tiny_patch16_224.safetensors"
    if not weights.is_file():
        pytest.skip(f"no real weights at {REAL}; point TOKENGAME_REAL_DATA at them")
    create = timm.create_model

    def create_model(name, pretrained=False, **settings):
        assert not pretrained or name == "vit_tiny_patch16_224"
        return create(name, checkpoint_path=str(weights) if pretrained else "", **settings)

    monkeypatch.setattr(timm, "create_model", create_model)


@pytest.mark.parametrize(("needs", "code"), list(blocks("python")))
def test_snippets_run_as_they_are_written(needs, code, request, tmp_path, monkeypatch):
    folder = request.getfixturevalue(needs) if needs else None
    monkeypatch.chdir(folder or tmp_path)
    exec(compile(code, "snippet", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize(("needs", "text"), list(blocks("console")))
def test_command_lines_parse(needs, text):
    """Every flag exists and takes such values; nothing runs."""
    assert needs is None
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["tokengame"] and words[1:] not in (["--help"], ["--version"]):
            assert parse(words[1:]).name == words[1]


def test_the_notebook_runs(tmp_path):
    nbclient = pytest.importorskip("nbclient", reason="pip install tokengame[dev]")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(ROOT / "docs" / "tour.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "outputs are not kept in the repository"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    client = nbclient.NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=environment)
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in shown)


def test_every_line_of_what_a_pruned_model_honours_names_a_test_that_exists():
    lines = [line for line in (ROOT / "docs" / "native.md").read_text().splitlines() if line.startswith("| ")]
    lines = [line for line in lines if not line.endswith("| Test |")]
    assert len(lines) > 40
    for line in lines:
        named = re.findall(r"`(?:(test_\w+\.py)::)?(test_\w+)`", line.rsplit("|", 2)[1])
        assert named, f"no test: {line}"
        for file, name in named:
            text = (ROOT / "tests" / (file or "test_native_model.py")).read_text()
            assert f"def {name}(" in text, f"{name} is not in {file or 'test_native_model.py'}"
