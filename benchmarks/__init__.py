"""Measured cost, beside the peers and the physical floor.

`cases` says what is measured, as data; `machines` on what; `contenders` how each side is called and
checked; `floor` and `traffic` count bytes and operations; `runner` measures; `report` writes the
tables of the README files from the committed results. ``yoso bench cpu`` and ``yoso bench gpu`` run
it.
"""
