"""The documentation builds without a warning, and its notebook runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_pages_build_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="pip install tokengame[docs]")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "api" / "index.html").read_text()
    assert "Make a trained Vision Transformer faster." in page, "docstrings are rendered"


def test_no_page_is_unfinished():
    for page in (ROOT / "docs").glob("*.md"):
        assert not re.search(r"@[A-Z_]+@|TODO", page.read_text()), page.name


def test_the_notebook_runs(tmp_path):
    nbclient = pytest.importorskip("nbclient", reason="pip install tokengame[dev]")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(ROOT / "docs" / "tour.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "outputs are not kept in the repository"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=environment)
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in shown)
