"""What is done to all tables between the two rounds of `yoso_core.cpu.rounds`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from yoso_core.cpu.compiling import helper
from yoso_core.cpu.threads import BATCH_COST, share


@helper
def table_at(table, part0, parts, per, num_hash, part_size, table_size):
    """The index of a table's head, where the table begins, and whether its hash is there, in the
    layout of `TableStep`.
    """
    slot, hash = divmod(table, per)
    head_index, part = divmod(slot, parts)
    return head_index, slot * part_size + hash * table_size, (part0 + part) * per + hash < num_hash


@dataclass(frozen=True)
class TableStep:
    """``work(first, last, tables=, part0=, parts=, per=, num_hash=, part_size=)`` does a range of
    tasks, so many to the table of a hash. The tables of ``parts`` parts of some heads, ``per`` to a
    part, begin ``part_size`` entries after one another; those of hashes from ``num_hash`` on are
    not there.
    """

    work: Callable[..., None]
    tasks: int
    """For the table of a hash."""
    cost: float
    """Of the table of a hash."""

    def in_pieces(self, tables: int, call: dict[str, Any]) -> Iterator[None]:
        """So many tables, by this thread alone, which may be stopped at each step."""
        together = max(1, int(BATCH_COST * self.tasks / max(self.cost, 1)))
        for task in range(0, tables * self.tasks, together):
            self.work(task, min(task + together, tables * self.tasks), **call)
            yield

    def by_all_threads(self, tables: int, call: dict[str, Any], num_threads: int | None) -> None:
        """So many tables."""
        share(tables * self.tasks, partial(self.work, **call), num_threads=num_threads, cost=tables * self.cost)
