"""Build the notebooks from their text sources, with outputs, and the index:
``python -m yoso_core.tutorials.build [NUMBER ...]``.

A notebook holds nothing that changes from run to run but what its own cells print: cells are
numbered, times and versions left out.
"""

import re
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient

from yoso_core.files import written
from yoso_core.tutorials import FOLDER, index, short_index, tutorials

LARGEST = 400_000
"""Bytes of a built notebook."""

MARKS = ("<!-- tutorials -->\n", "<!-- /tutorials -->")


def notebook_of(path: Path) -> Any:
    """The notebook of a text source, not yet run: no wrong answers, solutions folded."""
    read = jupytext.read(path, fmt="py:percent")
    python = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}, "language_info": {"name": "python"}}
    notebook = nbformat.v4.new_notebook(metadata=python)
    for cell in read.cells:
        tags = cell.metadata.get("tags", [])
        if any(tag.startswith("wrong-") for tag in tags):
            continue
        folded = {"jupyter": {"source_hidden": True}} if any(tag.startswith("solution-") for tag in tags) else {}
        metadata = {"tags": tags, **folded} if tags else {}
        new: Any = nbformat.v4.new_code_cell if cell.cell_type == "code" else nbformat.v4.new_markdown_cell
        notebook.cells.append(new(cell.source, id=f"cell-{len(notebook.cells) + 1}", metadata=metadata))
    return notebook


def run_notebook(notebook: Any) -> None:
    """Execute in a fresh kernel, in an empty folder, and keep the outputs; checkers are left to the
    reader, whose answer they wait for.

    Raises ``RuntimeError`` where a cell writes to stderr, and what nbclient raises where one fails.
    """
    with TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        client = NotebookClient(notebook, timeout=600, record_timing=False, coalesce_streams=True, resources=resources)
        kernel = client.create_kernel_manager()
        kernel.transport, kernel.ip = "ipc", f"{folder}/.kernel"  # files in place of network ports
        with client.setup_kernel():
            for number, cell in enumerate(notebook.cells):
                tags = cell.metadata.get("tags", [])
                if cell.cell_type == "code" and not any(tag.startswith("check-") for tag in tags):
                    client.execute_cell(cell, number)
                    for output in cell.outputs:
                        output.pop("transient", None)
                        if output.output_type == "stream" and output.name == "stderr":
                            raise RuntimeError(f"{cell.id} writes to stderr: {output.text}")
    notebook.metadata.language_info = {"name": "python"}  # the kernel has put its version there


def build(path: Path) -> Path:
    """Run a text source as a notebook and write it beside the source. Raises ``RuntimeError`` if
    it is too large.
    """
    notebook = notebook_of(path)
    run_notebook(notebook)
    text = nbformat.writes(notebook)
    if len(text.encode()) > LARGEST:
        raise RuntimeError(
            f"{path.stem}.ipynb would have {len(text.encode()):,} bytes, at most {LARGEST:,} are allowed: fewer or smaller figures"
        )
    target = path.with_suffix(".ipynb")
    with written(target) as part:
        part.write_text(text + "\n", encoding="utf-8")
    return target


def write_index(readme: Path, text: str) -> None:
    """Put the index of tutorials between the marks of a README."""
    before, after = MARKS
    old = readme.read_text(encoding="utf-8")
    with written(readme) as part:
        part.write_text(re.sub(f"(?s){before}.*{after}", lambda _: f"{before}{text}\n{after}", old), encoding="utf-8")


if __name__ == "__main__":
    wanted = [int(number) for number in sys.argv[1:]]
    for tutorial in tutorials():
        if not wanted or tutorial.number in wanted:
            start = time.perf_counter()
            target = build(tutorial.path)
            print(f"{target.name}: {time.perf_counter() - start:.0f} s, {target.stat().st_size / 1000:.0f} kB", flush=True)
    write_index(FOLDER / "README.md", index())
    write_index(FOLDER.parent / "README.md", short_index())
