"""The notebook of docs/examples, run as it lies there: its cells end without an error and show what it promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "docs" / "examples" / "python.ipynb"


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The notebook with the outputs of its cells."""
    folder = tmp_path_factory.mktemp("notebook")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"):
            patch.setenv(name, str(folder))
        found = nbformat.read(NOTEBOOK, as_version=4)
        client = NotebookClient(
            found, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
        )
        return client.execute()


def outputs(notebook: Any, start: str) -> list[Any]:
    """What the cell shows that has a line which begins so."""
    (cell,) = [
        cell
        for cell in notebook.cells
        if cell.cell_type == "code" and any(line.startswith(start) for line in cell.source.split("\n"))
    ]
    return list(cell.outputs)


def pages(found: list[Any]) -> str:
    return "".join(one["data"].get("text/html", "") for one in found if "data" in one)


def test_it_is_kept_without_outputs() -> None:
    """They would go stale."""
    kept = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(kept)
    assert all(not cell.outputs and cell.execution_count is None for cell in kept.cells if cell.cell_type == "code")


def test_its_cells_show_results_as_tables(notebook: Any) -> None:
    for start, words in {
        "llm_quantize.info": ("architecture", "llama"),
        "llm_quantize.plan": ("Q8_0", "Q4_K_M", "Q2_K"),
        "made =": ("written", "Q2_K"),
        "checked =": ("ok=True", "relative error"),
        "lost =": ("kld", "same top", "Q4_K_M"),
        "table =": ("kld_sem", "demo-llama-Q2_K.gguf"),
    }.items():
        page = pages(outputs(notebook, start))
        assert "<table" in page, start
        assert all(word in page for word in words), start


def test_it_shows_progress_without_being_asked(notebook: Any) -> None:
    """rich's bars, in the notebook's own display; nothing is printed beside them."""
    for start, name in {"made =": "quantize", "checked =": "verify", "lost =": "divergence"}.items():
        found = outputs(notebook, start)
        assert not [one for one in found if one.output_type == "stream"], start
        assert name in pages(found), start
        assert "100%" in pages(found), start


def test_it_compares_and_runs(notebook: Any) -> None:
    (difference,) = outputs(notebook, "pair =")
    assert difference.text.startswith("KL divergence -0.")
    assert len(outputs(notebook, "print(llm_quantize.run")[0].text) > 20
