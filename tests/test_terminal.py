"""The command line on terminals of all kinds, in a pipe, and where the locale knows ASCII alone."""

import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable

import pytest
from typer.testing import CliRunner

from yoso_core.cli import app

SMALL = (
    "--n",
    "9",
    "--heads",
    "1",
    "--dim",
    "4",
    "--num-hash",
    "2",
    "--hash-code-len",
    "3",
    "--repeats",
    "1",
    "--variants",
    "numpy:tables",
)

COMMANDS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("info",): ("operation", "numpy:pairs", "Where kernels run", "Hash of dim 64"),
    ("compare", "lsh_cumulation", *SMALL): ("numpy:tables", "agrees", "largest"),
    ("kernel",): ("shared_table", "CUDA C++"),
    ("tutorial",): ("minutes",),
    ("--help",): ("fill-mask", "compare"),
    ("compare", "--help"): ("Usage: yoso compare", "--n", "Queries."),
}
"""And what each prints, whatever it is printed on."""

every_command = pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command[:2]))

ENVIRONMENTS: dict[str, dict[str, str]] = {
    "colors": {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "200"},
    "narrow": {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "40"},
    "dumb": {"NO_COLOR": "1", "TERM": "dumb"},
}

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def words(printed: str) -> str:
    """Without colors; with one space for whatever stands between two words."""
    return " ".join(re.sub(r"[│┃|\n]", " ", CONTROL.sub("", printed)).split())


@every_command
@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_what_is_printed_says_the_same(environment: str, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENTS[environment].items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(app, list(command), prog_name="yoso")
    assert result.exit_code == 0, result.output
    assert [said for said in COMMANDS[command] if said not in words(result.output)] == []
    if environment == "dumb":
        assert not CONTROL.search(result.output)


def on_a_terminal(columns: int) -> Callable[[tuple[str, ...]], str]:
    def run(command: tuple[str, ...]) -> str:
        terminal, program = pty.openpty()
        with os.fdopen(terminal, "rb", buffering=0) as screen:
            environment = os.environ | {"COLUMNS": str(columns), "TERM": "xterm-256color", "PYTHONUTF8": "1"}
            started = subprocess.Popen(
                [sys.executable, "-m", "yoso_core", *command], stdin=program, stdout=program, stderr=program, env=environment
            )
            os.close(program)
            shown = b""
            try:
                while part := screen.read(4096):
                    shown += part
            except OSError:  # Linux says so when the other end is closed
                pass
            assert started.wait(60) == 0, shown
        return shown.decode("utf-8")

    return run


def test_tables_fit_a_real_terminal() -> None:
    shown = on_a_terminal(60)(("info",))
    assert CONTROL.search(shown), "it is in color"
    tables = [line for line in CONTROL.sub("", shown).splitlines() if line[:1] in "┏┃│└├┡"]
    assert len(tables) > 20
    assert {len(line) for line in tables} <= set(range(61))


def test_letters_that_the_locale_lacks_are_replaced() -> None:
    """A microsecond has a Greek letter."""
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for command, says in (("compare", "lsh_cumulation", *SMALL), "agrees"), (("info",), "numpy:pairs"):
        done = subprocess.run([sys.executable, "-m", "yoso_core", *command], env=environment, capture_output=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
        assert says in done.stdout.decode("ascii")
