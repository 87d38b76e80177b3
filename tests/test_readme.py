"""The README's form, and what its programs print."""

import contextlib
import io
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", README)
PROGRAMS = [text for language, text in BLOCKS if language == "python"]


def run(program: str) -> str:
    """What a program prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(program, "README.md", "exec"), {})
    return printed.getvalue()


def test_the_program_prints_what_stands_below_it() -> None:
    program, output = BLOCKS[1][1], BLOCKS[2][1]
    assert program == PROGRAMS[0]
    assert run(program) == output


def test_your_own_kernel_agrees() -> None:
    (call,) = re.findall(r"(?m)^`(print\(yoso_core\.compare\(.+\))`", README)
    printed = run(f"import yoso_core\n{PROGRAMS[1]}\n{call}")
    (row,) = re.findall(r"(?m)^mine +(\w+)", printed)
    assert row == "agrees"


def test_it_opens_with_an_install_a_program_and_the_two_commands() -> None:
    assert [language for language, _ in BLOCKS[:4]] == ["sh", "python", "", "sh"]
    assert BLOCKS[0][1].startswith("pip install ")
    assert len(PROGRAMS[0].splitlines()) <= 15
    assert re.findall(r"(?m)^make ([a-z-]+)", BLOCKS[3][1]) == ["demo", "test"]


def test_the_extras_that_it_names_are_there() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    named = set(re.findall(r"\.\[(\w+)\]", README))
    assert named
    assert named <= extras.keys()


def test_it_is_short() -> None:
    assert len(README.splitlines()) < 80
    outside_code = re.sub(r"(?ms)^```.*?^```$", "", README)
    assert [line for line in outside_code.splitlines() if len(line) >= 100] == []


def test_its_tables_are_small() -> None:
    rows = [line for line in README.splitlines() if line.startswith("|")]
    assert 2 + 4 <= len(rows) <= 2 + 5, "four or five headline numbers below the header"
    assert max(row.count("|") for row in rows) <= 4


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#\s]+)", README)) - {"https://arxiv.org/abs/2111.09714"}))
def test_a_link_leads_to_a_file(target: str) -> None:
    assert (ROOT / target).exists()
