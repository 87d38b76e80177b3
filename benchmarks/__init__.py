"""Measured cost, beside the peers and the physical floor.

`cases` says what is measured, as data, and `machines` on what. `contenders` calls and checks each
side; `floor` and `traffic` count bytes and operations. `runner` measures, and `report` writes the
tables of the README files from the committed results. `isa` limits a run to some
instructions. The commands are ``yoso bench cpu``, ``yoso bench model``, ``yoso bench gpu``,
``yoso bench bias``, ``yoso bench error`` and ``yoso bench learning``.
"""
