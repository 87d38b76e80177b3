"""A program of its own: ``python -m yoso_core.demo.compiling`` compiles what the training needs,
``python -m yoso_core.demo.compiling everything`` all that the demo needs. The Makefile runs the
second once, at the end of the installation.
"""

import math
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from yoso_core.demo import LanguageSizes, Sizes, run
from yoso_core.demo.language import compile_kernels


def compile_everything() -> None:
    """Run the demo with as little work as there can be, on the default text."""
    language = LanguageSizes(steps=1, windows=1, nums_hash=(16,), fills=1)
    sizes = Sizes(passage=512, words=1, nums_hash=(32, 64), hashes=64, lengths=(512,), repeats=1, agreement=64, language=language)
    with TemporaryDirectory() as folder:
        run(output=Path(folder) / "picture.png", show=False, budget=math.inf, sizes=sizes, ahead=False)


if __name__ == "__main__":
    if sys.argv[1:] == ["everything"]:
        compile_everything()
    else:
        compile_kernels(LanguageSizes())
