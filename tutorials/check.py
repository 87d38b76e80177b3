"""Run a tutorial from its text source, top to bottom, then its exercises:
``python -m yoso_core.tutorials.check FILE.py``.

Warnings are errors, every figure is drawn and searched for text that is cut off or too small. Then
the checker of every exercise must accept the solution, and refuse the blank and each wrong answer.
An exercise is made of cells with these tags, K counting from 1:

``exercise-K``  the blank: it defines what the reader shall complete ``check-K``     the checker: it
raises where the answer is wrong; a notebook is built without running it ``solution-K``  one right
answer, at the end of the file ``wrong-K``     a plausible wrong answer, at the very end; it does
not go into the notebook
"""

import ast
import linecache
import re
import sys
import traceback
import types
import warnings
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jupytext
from matplotlib.figure import Figure

EXERCISE_TAG = re.compile(r"(exercise|check|solution|wrong)-([1-9])")


class TutorialError(Exception):
    """A tutorial does not keep a promise."""


@dataclass(frozen=True)
class Cell:
    """A cell of the text source; ``kind`` is code or markdown."""

    number: int
    kind: str
    source: str
    tags: tuple[str, ...]

    @property
    def role(self) -> tuple[str, int] | None:
        """What it is to which exercise; ``None`` for a cell that is simply run."""
        found = [match for tag in self.tags if (match := EXERCISE_TAG.fullmatch(tag))]
        return (found[0][1], int(found[0][2])) if found else None


@dataclass
class Exercise:
    blank: list[Cell] = field(default_factory=list)
    checks: list[Cell] = field(default_factory=list)
    solutions: list[Cell] = field(default_factory=list)
    wrong: list[Cell] = field(default_factory=list)


def read_cells(path: Path) -> list[Cell]:
    """The cells of a text source, numbered from 1. Raises `TutorialError` for a tag that means
    nothing.
    """
    cells = []
    for number, cell in enumerate(jupytext.read(path, fmt="py:percent").cells, 1):
        tags = tuple(cell.metadata.get("tags", ()))
        if any(not EXERCISE_TAG.fullmatch(tag) for tag in tags) or len(tags) > 1:
            raise TutorialError(f"{path.name}, cell {number}: need one tag such as exercise-1, check-1, solution-1 or wrong-1, got {tags}")
        cells.append(Cell(number, cell.cell_type, cell.source, tags))
    return cells


def exercises(cells: list[Cell]) -> dict[int, Exercise]:
    """The exercises by number. Raises `TutorialError` if one lacks a part."""
    found: dict[int, Exercise] = defaultdict(Exercise)
    for cell in cells:
        if cell.role is not None:
            role, number = cell.role
            exercise = found[number]
            {"exercise": exercise.blank, "check": exercise.checks, "solution": exercise.solutions, "wrong": exercise.wrong}[role].append(
                cell
            )
    for number, exercise in found.items():
        if not (len(exercise.blank) == len(exercise.checks) == len(exercise.solutions) == 1 and exercise.wrong):
            raise TutorialError(f"exercise {number}: need one exercise, one check, one solution and at least one wrong cell")
    return dict(sorted(found.items()))


def run_cell(cell: Cell, name: str, namespace: dict[str, Any]) -> None:
    """Execute a cell as a notebook does: a figure that it ends with is drawn. Errors name the
    file, the cell and its line.
    """
    filename = f"{name}, cell {cell.number}"
    linecache.cache[filename] = (len(cell.source), None, cell.source.splitlines(keepends=True), filename)
    body = ast.parse(cell.source, filename).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), filename, "exec"), namespace)
    if isinstance(last, ast.Expr):
        shown = eval(compile(ast.Expression(last.value), filename, "eval"), namespace)
        if isinstance(shown, Figure):
            inspect_figure(shown, filename)
        elif shown is not None:
            repr(shown)


def inspect_figure(figure: Figure, where: str) -> None:
    """Raises `TutorialError` unless a notebook can show the figure, with every text whole and
    large enough to read.
    """
    from yoso_core.draw import Picture, clipped

    if not isinstance(figure, Picture):
        raise TutorialError(f"{where}: a figure that yoso_core.draw.picture did not make")
    if wrong := clipped(figure):  # which draws it as a notebook does
        raise TutorialError(f"{where}: {'; '.join(wrong)}")


def check_exercise(number: int, exercise: Exercise, name: str, namespace: dict[str, Any]) -> None:
    """The checker passes the solution and refuses the rest. Raises `TutorialError`, or what the
    solution or the checker raised.
    """
    (check,) = exercise.checks
    for answer in (*exercise.blank, *exercise.wrong):
        run_cell(answer, name, namespace)
        try:
            run_cell(check, name, namespace)
        except AssertionError as refused:
            if not str(refused):
                raise TutorialError(f"{name}, exercise {number}: the checker refuses cell {answer.number} without a word") from refused
        except NotImplementedError:
            if answer not in exercise.blank:
                raise
        else:
            raise TutorialError(f"{name}, exercise {number}: the checker accepts cell {answer.number}, tagged {answer.tags[0]}")
    for cell in (*exercise.solutions, check):
        run_cell(cell, name, namespace)


def check_tutorial(path: Path) -> None:
    """Everything above, in a new ``__main__`` module: what a cell defines can be pickled and
    inspected, as in a notebook.
    """
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    cells = read_cells(path)
    found = exercises(cells)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for cell in cells:
            if cell.kind == "code" and (cell.role is None or cell.role[0] in ("exercise", "solution")):
                run_cell(cell, path.name, vars(main))
        for number, exercise in found.items():
            check_exercise(number, exercise, path.name, vars(main))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # nobody reads it; an ASCII locale lacks some letters
    try:
        check_tutorial(Path(sys.argv[1]))
    except BaseException:  # the new __main__ must not be asked how to print it
        traceback.print_exc()
        sys.exit(1)
