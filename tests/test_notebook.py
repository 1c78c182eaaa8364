"""docs/quickstart.ipynb runs from its first cell to its last, in a kernel of its own, and shows what it says."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from every import every

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "quickstart.ipynb"


def test_it_is_stored_without_outputs() -> None:
    notebook = nbformat.read(PAGE, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert every(cell.outputs == [] and cell.execution_count is None for cell in cells)


@pytest.mark.cluster
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the user's own cache, in which the kernels are compiled already."""
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(PAGE, as_version=4)
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    printed = {
        name: "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
        for name, outputs in shown.items()
    }
    progress = "".join(output.text for output in shown["run"] if output.get("name") == "stderr")
    assert "round 1: perplexity" in progress and "\x1b" not in progress, "plain lines, no bar"
    assert printed["run"].splitlines()[-1] == "run: runs/notebook" and (tmp_path / "runs" / "notebook" / "report.html").exists()
    assert any("image/png" in output.get("data", {}) for output in shown["curve"])
    assert "layers.0" in printed["adapters"] and len(printed["adapters"].splitlines()) == 9
    assert len(printed["clients"].splitlines()) == 4 and "nan" not in printed["clients"]
