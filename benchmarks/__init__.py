"""Measured cost, beside the peers and the physical floor.

`cases` says what is measured, as data; `contenders` how each side is called and checked; `runner` measures; `report` writes the tables of
the README files from the committed results. ``yoso bench cpu`` runs it.
"""
