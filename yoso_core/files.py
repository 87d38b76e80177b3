"""Files that are written in one step: under a name of their own in the same folder, and renamed
once they are whole. So a full disk, or a Ctrl-C, leaves what was there before, or nothing.
"""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any


@contextmanager
def written(path: str | PathLike[str]) -> Iterator[Path]:
    """The path to write to, in the body, in place of ``path``: in the same folder and with the same
    suffix. ``path`` itself becomes that file at the end, unless the body raises.

    What can only be written in place is: a device, a pipe, a file in a folder that takes no other.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     target = Path(folder, "notes.txt")
    ...     with written(target) as part:
    ...         _ = part.write_text("whole")
    ...     target.read_text(), [file.name for file in Path(folder).iterdir()]
    ('whole', ['notes.txt'])
    """
    target = Path(path).resolve()  # a link stays a link
    if target.exists() and not (target.is_file() and os.access(target.parent, os.W_OK)):
        yield Path(path)
        return
    part = target.with_name(f".{secrets.token_hex(8)}.part{target.suffix}")
    try:
        yield part
        if target.exists():
            shutil.copymode(target, part)
        os.replace(part, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink()
        if isinstance(error, OSError) and error.filename == str(part):
            error.filename = str(path)
        raise


def write_json(path: str | PathLike[str], thing: Any) -> None:
    """Dicts, lists and numbers, in a file whose folder is made where it does not exist.

    >>> with TemporaryDirectory() as folder:
    ...     write_json(Path(folder, "new", "result.json"), {"n": [512]})
    ...     json.loads(Path(folder, "new", "result.json").read_text("utf-8"))
    {'n': [512]}
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with written(path) as part:
        part.write_text(json.dumps(thing, indent=1) + "\n", "utf-8")


@contextmanager
def written_folder(path: str | PathLike[str]) -> Iterator[Path]:
    """A folder to write to, in the body. Its files take their places in ``path`` at the end, unless
    the body raises. ``path`` is made where it does not exist; its other files stay.

    >>> with TemporaryDirectory() as folder:
    ...     with written_folder(Path(folder, "new")) as part:
    ...         _ = (part / "a.txt").write_text("whole")
    ...     [str(file.relative_to(folder)) for file in Path(folder).rglob("*.txt")]
    ['new/a.txt']
    """
    folder = Path(path)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".", suffix=".part", dir=folder if folder.is_dir() else folder.parent) as part:
        yield Path(part)
        for file in sorted(Path(part).rglob("*")):
            target = folder / file.relative_to(part)
            if file.is_dir():
                target.mkdir(parents=True, exist_ok=True)
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, target)
