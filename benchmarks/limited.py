"""The process of a limited run, which `yoso_core.benchmarks.isa` starts:
``python -m yoso_core.benchmarks.limited OUTCOME '{"name": "cpu"}'`` runs the suite and leaves what
came of it, a path or an error, in the file OUTCOME.
"""

import json
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from yoso_core.benchmarks.runner import RedComparison, run_suite
from yoso_core.files import written


def main(outcome: Path, options: Mapping[str, Any]) -> None:
    found: str | Exception
    try:
        found = str(run_suite(**{**options, "output": Path(options["output"])}))
    except (RedComparison, ValueError, OSError, ImportError, MemoryError) as error:
        found = error
    with written(outcome) as part:
        part.write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
