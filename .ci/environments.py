"""The tests of what is printed, drawn and installed, under three environments that a reader may
have, as ``tests/conftest.py`` finds them: ``python .ci/environments.py [PYTEST OPTIONS]``.
"""

import os
import pty
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]

FILES = [f"tests/test_{name}.py" for name in ("cli", "comparison", "demo", "draw", "fill_mask", "packaging", "terminal", "tutorials")]

SETTINGS = {
    ".config/matplotlib/matplotlibrc": "font.size: 30\nfigure.dpi: 30\nfigure.facecolor: black\naxes.unicode_minus: False\n",
    ".config/pip/pip.conf": "[global]\nindex-url = https://nowhere.invalid/simple\n",
    ".gitconfig": "[color]\n\tui = always\n",
    ".ipython/profile_default/ipython_config.py": "raise SystemExit('the configuration of the home folder was read')\n",
    ".jupyter/jupyter_config.py": "raise SystemExit('the configuration of the home folder was read')\n",
    ".pythonrc.py": "raise SystemExit('the configuration of the home folder was read')\n",
}
"""Of a home folder in which nothing is as we would have it."""


def in_a_terminal(command: list[str], environment: dict[str, str]) -> int:
    """Standard input, output and error are one terminal."""
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(ROOT)
        os.execve(command[0], command, environment)
    with os.fdopen(terminal, "rb", buffering=0) as screen:
        while True:
            try:
                shown = screen.read(4096)
            except OSError:  # Linux says so when the other end is closed
                break
            if not shown:
                break
            sys.stdout.buffer.write(shown)
            sys.stdout.flush()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def in_a_pipe(command: list[str], environment: dict[str, str]) -> int:
    return subprocess.run(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, check=False).returncode


def main() -> int:
    command = [sys.executable, "-m", "pytest", "-q", "--quick", *FILES, *sys.argv[1:]]
    with tempfile.TemporaryDirectory(prefix="a home, ") as home:
        for name, text in SETTINGS.items():
            path = Path(home, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
        own = {"HOME": home, "PYTHONSTARTUP": f"{home}/.pythonrc.py", "COLUMNS": "200", "LC_ALL": "C", "PYTHONUTF8": "0"}
        runs = (
            ("a terminal of 40 columns, colors forced", in_a_terminal, {"FORCE_COLOR": "1", "COLUMNS": "40", "TERM": "xterm-256color"}),
            ("a dumb terminal, no colors, the C locale", in_a_pipe, {"NO_COLOR": "1", "TERM": "dumb", "LC_ALL": "C", "LANG": "C"}),
            ("a home folder with other settings, 200 columns, ASCII", in_a_pipe, own),
        )
        for what, run, changes in runs:
            print(f"== {what}", flush=True)
            if status := run(command, os.environ | changes):
                return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
