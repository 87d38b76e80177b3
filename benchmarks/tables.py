"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def markdown(header: Sequence[object], rows: Iterable[Iterable[object]], *, left: int | None = None) -> str:
    """A table, whose columns from number ``left`` on are numbers and stand at the right.

    >>> print(markdown(["n", "time"], [[512, "1.43 ms"]], left=1), end="")
    | n | time |
    | --- | ---: |
    | 512 | 1.43 ms |
    """
    words = len(header) if left is None else left
    rule = ["---"] * words + ["---:"] * (len(header) - words)
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in (header, rule, *rows))
