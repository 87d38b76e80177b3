"""The tutorials: what there is, and copies of it for a reader's folder.

``NN_name.py`` is the source of a tutorial, in Jupytext's percent format; ``NN_name.ipynb`` beside
it is built from it, with outputs. Listing and copying need nothing but the standard library.
"""

import re
import shutil
import textwrap
from dataclasses import dataclass
from pathlib import Path

from yoso_core.files import written

FOLDER = Path(__file__).resolve().parent

HEADER = re.compile(
    r"""\#\ %%\ \[markdown\]\n
    \#\ \#\ (?P<number>\d+)\.\ (?P<title>[^\n]+)\n\#\n
    \#\ \*\*You\ will\ be\ able\ to\*\*\ (?P<promise>.+?)\n\#\n
    \#\ \*\*Time:\*\*\ (?P<time>.+?)\n\#\n
    \#\ \*\*You\ need:\*\*\ (?P<needs>.+?)\n\#\n
    \#\ \*\*Source:\*\*\ (?P<source>.+?)\n\#?\s*\n""",
    re.VERBOSE | re.DOTALL,
)


@dataclass(frozen=True)
class Tutorial:
    """A tutorial, as its own first cell describes it."""

    path: Path
    """The text source."""
    number: int
    title: str
    promise: str
    """Ends the sentence "You will be able to"."""
    time: str
    needs: str
    """What the reader should know, or have worked through."""

    @property
    def notebook(self) -> Path:
        return self.path.with_suffix(".ipynb")


def describe(path: Path) -> Tutorial:
    """Read the first cell of a text source.

    Raises ``ValueError`` if it does not have the form that CONTRIBUTING.md gives.
    """
    found = HEADER.match(path.read_text(encoding="utf-8"))
    if found is None:
        raise ValueError(f"path: {path.name} does not open with a title, what the reader will be able to do, Time, You need, Source")
    if not path.name.startswith(f"{int(found['number']):02}_"):
        raise ValueError(f"path: {path.name} calls itself tutorial {found['number']}")
    words = {name: " ".join(found[name].replace("\n# ", " ").split()).removesuffix(".") for name in ("title", "promise", "time", "needs")}
    return Tutorial(path, int(found["number"]), **words)


def tutorials() -> list[Tutorial]:
    """Every tutorial, in order."""
    return [describe(path) for path in sorted(FOLDER.glob("[0-9][0-9]_*.py"))]


def index() -> str:
    """The table of tutorials/README.md."""
    rows = [f"| {t.number} | [{t.title}]({t.notebook.name}) | {t.promise} | {t.time} | {t.needs} |" for t in tutorials()]
    return "\n".join(["| | tutorial | you will be able to | time | you need |", "|---|---|---|---|---|", *rows])


def short_index() -> str:
    """The paragraph of README.md: number, title, and minutes to read and for the exercises."""
    told = [f"**{t.number}** {t.title} ({'+'.join(re.findall('[0-9]+', t.time))})" for t in tutorials()]
    return textwrap.fill(", ".join(told) + ".", width=99, break_long_words=False, break_on_hyphens=False)


def copy(number: int, folder: Path, *, text: bool = False, overwrite: bool = False) -> Path:
    """Copy a tutorial's notebook, or its text source, to a folder, and return where it is now.

    Raises ``ValueError`` for a number or a folder that does not exist, or a file that does unless
    ``overwrite``.
    """
    known = {tutorial.number: tutorial for tutorial in tutorials()}
    if number not in known:
        raise ValueError(f"number: no tutorial {number}, there are {', '.join(map(str, known))}")
    if not folder.is_dir():
        raise ValueError(f"folder: {folder} is not a folder")
    source = known[number].path if text else known[number].notebook
    target = folder / source.name
    if target.exists() and not overwrite:
        raise ValueError(f"folder: {target} exists, and may hold your answers; --overwrite replaces it, --folder names another place")
    with written(target) as part:
        shutil.copyfile(source, part)
    return target
