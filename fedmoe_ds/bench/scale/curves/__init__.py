"""One curve a module: `NAME`, `X` (what x counts), `POINTS` (ascending), `WALL` (one line: the limit, and where it stands) and
`measure(x)`, which returns figures by name.

A point is measured in a process of its own, so its peak of memory is its own. Where `measure` gives no `seconds`, those of the
whole call are taken.
"""
