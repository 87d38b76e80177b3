"""The tutorials run, their checkers tell right from wrong, and the notebooks are those of the
sources; and what does all this can fail.
"""

import re
import subprocess
import sys
from itertools import pairwise

import pytest
from typer.testing import CliRunner

from yoso_core import tutorials
from yoso_core.cli import app

nbformat = pytest.importorskip("nbformat", reason="needs yoso_core[tutorials]")
pytest.importorskip("jupytext", reason="needs yoso_core[tutorials]")
pytest.importorskip("nbclient", reason="needs yoso_core[tutorials]")

from yoso_core.tutorials import build, check  # noqa: E402

ALL = tutorials.tutorials()
every_tutorial = pytest.mark.parametrize("tutorial", ALL, ids=[tutorial.path.stem for tutorial in ALL])


LONG = (3, 4, 6, 7, 8, 9, 10, 11, 12, 13)
"""These train models, draw distributions, go to a million tokens or compile their own kernels."""


@pytest.mark.slow
@pytest.mark.parametrize("tutorial", [pytest.param(t, id=t.path.stem, marks=[pytest.mark.long] if t.number in LONG else []) for t in ALL])
def test_it_runs_and_its_checkers_tell_right_from_wrong(tutorial, tmp_path):
    command = [sys.executable, "-m", "yoso_core.tutorials.check", str(tutorial.path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr == ""
    assert not list(tmp_path.iterdir()), "a tutorial leaves no files behind"


@every_tutorial
def test_the_notebook_is_built_from_the_source(tutorial):
    built, expected = nbformat.read(tutorial.notebook, as_version=4), build.notebook_of(tutorial.path)
    for have, want in zip(built.cells, expected.cells, strict=True):
        assert (have.id, have.cell_type, have.source, have.metadata) == (want.id, want.cell_type, want.source, want.metadata), (
            f"make tutorials ARGS={tutorial.number}"
        )
    assert built.metadata == expected.metadata


@every_tutorial
def test_the_notebook_was_run_from_top_to_bottom_without_an_error(tutorial):
    cells = [cell for cell in nbformat.read(tutorial.notebook, as_version=4).cells if cell.cell_type == "code"]
    checkers = [cell for cell in cells if any(tag.startswith("check-") for tag in cell.metadata.get("tags", ()))]
    assert all(cell.execution_count is None and not cell.outputs for cell in checkers)
    run = [cell for cell in cells if cell not in checkers]
    assert [cell.execution_count for cell in run] == list(range(1, len(run) + 1))
    outputs = [output for cell in run for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", ()) for output in outputs)
    assert tutorial.notebook.stat().st_size <= build.LARGEST


@every_tutorial
def test_it_has_two_or_three_exercises(tutorial):
    assert list(check.exercises(check.read_cells(tutorial.path))) in ([1, 2], [1, 2, 3])


@every_tutorial
def test_its_links_lead_to_files(tutorial):
    text = tutorial.path.read_text("utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert any(link.startswith("../") for link in links), "a tutorial links to the source that it explains"
    assert [link for link in links if not link.startswith("https://") and not (tutorials.FOLDER / link.partition("#")[0]).exists()] == []


@every_tutorial
def test_no_line_of_a_text_becomes_a_list_by_accident(tutorial):
    """A line that is wrapped in front of "+ a" or of "35. " would be one."""
    begins = re.compile(r"([-+*]|\d+[.)]) ")
    for cell in check.read_cells(tutorial.path):
        lines = cell.source.splitlines() if cell.kind == "markdown" else []
        for before, line in pairwise(lines):
            in_a_list = before.strip() == "" or begins.match(before) or before.startswith("  ")
            assert in_a_list or not begins.match(line), f"cell {cell.number}: {line!r}"


def test_they_are_numbered_from_one():
    assert [tutorial.number for tutorial in ALL] == list(range(1, len(ALL) + 1))


@pytest.mark.parametrize(("readme", "index"), [("tutorials/README.md", tutorials.index), ("README.md", tutorials.short_index)])
def test_the_index_is_that_of_the_tutorials(readme, index):
    text = (tutorials.FOLDER.parent / readme).read_text("utf-8")
    before, after = build.MARKS
    assert text.partition(before)[2].partition(after)[0] == index() + "\n", "make tutorials"


# ---------------------------------------------------------------- a small tutorial, right and with
# one fault each

HEAD = """# %% [markdown]
# # 1. Doubling
#
# **You will be able to** double
# a number.
#
# **Time:** 1 minute.
#
# **You need:** numbers.
#
# **Source:** none.

# %%
from yoso_core import draw
"""
GOOD = (
    HEAD
    + """
figure, axes = draw.picture()
axes.plot([1, 2], [2, 4])
figure

# %% tags=["exercise-1"]
def double(x):
    raise NotImplementedError("exercise 1 is waiting for you")

# %% tags=["check-1"]
assert double(3) == 6, f"3 doubled is 6, not {double(3)}"
print("right")

# %% tags=["solution-1"]
def double(x):
    return 2 * x

# %% tags=["wrong-1"]
def double(x):
    return x**2
"""
)

FAULTS = {
    "accepts the blank": (('raise NotImplementedError("exercise 1 is waiting for you")', "return 6"), "accepts cell 3, tagged exercise-1"),
    "accepts a wrong answer": (("x**2", "x + x"), "accepts cell 6, tagged wrong-1"),
    "refuses the solution": (("2 * x", "3 * x"), "3 doubled is 6, not 9"),
    "refuses without a word": ((', f"3 doubled is 6, not {double(3)}"', ""), "refuses cell 6 without a word"),
    "crashes on a wrong answer": (("x**2", "y**2"), "name 'y' is not defined"),
    "has no wrong answer": (('tags=["wrong-1"]', ""), "exercise 1: need one exercise"),
    "has a tag that means nothing": (('tags=["wrong-1"]', 'tags=["wrong"]'), "cell 6: need one tag"),
    "claims what is not so": (("figure\n", "assert 1 + 1 == 3, 'no'\nfigure\n"), "no"),
    "warns": (("figure\n", "import warnings\nwarnings.warn('old')\nfigure\n"), "old"),
    "cuts off a text": (("figure\n", "figure.text(0.95, 0.5, 'too far right')\nfigure\n"), "'too far right' reaches beyond the figure"),
    "draws in another look": (
        ("figure\n", "from matplotlib.figure import Figure\nFigure()\n"),
        "a figure that yoso_core.draw.picture did not",
    ),
}


@pytest.fixture
def written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])  # a check puts its own there

    def write(text):
        path = tmp_path / "01_doubling.py"
        path.write_text(text, "utf-8")
        return path

    return write


def test_a_good_tutorial_passes(written):
    check.check_tutorial(written(GOOD))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault, written):
    (old, new), message = FAULTS[fault]
    assert old in GOOD
    with pytest.raises((check.TutorialError, AssertionError, NameError, UserWarning), match=re.escape(message)):
        check.check_tutorial(written(GOOD.replace(old, new, 1)))


@pytest.mark.slow
def test_the_process_fails_with_the_cell_and_the_line(written):
    path = written(GOOD.replace("figure\n", "assert 1 + 1 == 3, 'no'\nfigure\n", 1))
    done = subprocess.run([sys.executable, "-m", "yoso_core.tutorials.check", str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert 'File "01_doubling.py, cell 2", line 5' in done.stderr
    assert "assert 1 + 1 == 3" in done.stderr


def test_it_describes_itself(written):
    found = tutorials.describe(written(GOOD))
    assert (found.number, found.title, found.promise, found.time, found.needs) == (1, "Doubling", "double a number", "1 minute", "numbers")


@pytest.mark.parametrize(
    ("change", "message"), [(("**Time:** 1 minute", "1 minute"), "does not open with"), (("# 1. ", "# 2. "), "calls itself tutorial 2")]
)
def test_a_wrong_header_is_refused(change, message, written):
    with pytest.raises(ValueError, match=message):
        tutorials.describe(written(GOOD.replace(*change)))


@pytest.mark.slow
def test_building_runs_all_but_checkers_and_leaves_wrong_answers_out(written):
    first = build.build(written(GOOD)).read_bytes()
    path = build.build(written(GOOD))
    assert path.read_bytes() == first, "a rebuild changes nothing"
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    _, drawn, _, checker, solution = notebook.cells
    assert "x**2" not in path.read_text("utf-8")
    assert "image/png" in drawn.outputs[0].data
    assert checker.execution_count is None
    assert solution.metadata.jupyter.source_hidden
    assert solution.execution_count == 3


@pytest.mark.slow
def test_a_notebook_that_writes_to_stderr_is_not_built(written):
    path = written(HEAD + "import sys\nprint('hm', file=sys.stderr)\n")
    with pytest.raises(RuntimeError, match="cell-2 writes to stderr: hm"):
        build.build(path)
    assert not path.with_suffix(".ipynb").exists()


# ---------------------------------------------------------------- yoso tutorial


def yoso(*args):
    return CliRunner().invoke(app, ["tutorial", *map(str, args)], prog_name="yoso")


def test_the_command_lists_them():
    listed = yoso()
    assert listed.exit_code == 0
    assert all(tutorial.title in listed.output and tutorial.time.split(",")[0] in listed.output for tutorial in ALL)


@pytest.mark.parametrize(("options", "ending"), [((), ".ipynb"), (("--text",), ".py")], ids=["notebook", "text"])
def test_the_command_copies_and_never_overwrites_in_silence(options, ending, tmp_path):
    source = ALL[0].path.with_suffix(ending)
    copied = tmp_path / source.name
    done = yoso(1, "--folder", tmp_path, *options)
    assert done.exit_code == 0
    assert str(copied) in done.output
    assert copied.read_bytes() == source.read_bytes()

    copied.write_text("my answers")
    refused = yoso(1, "--folder", tmp_path, *options)
    assert refused.exit_code == 2
    assert "--overwrite" in refused.output
    assert copied.read_text("utf-8") == "my answers"

    assert yoso(1, "--folder", tmp_path, *options, "--overwrite").exit_code == 0
    assert copied.read_bytes() == source.read_bytes()


def test_the_command_refuses_a_number_and_a_folder_that_do_not_exist(tmp_path):
    assert "no tutorial 99, there are 1" in yoso(99).output
    assert "is not a folder" in yoso(1, "--folder", tmp_path / "nowhere").output
