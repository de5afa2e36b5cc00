"""Benchmarks of speed and memory, compared with other libraries.

The modules in the order of the flow: ``networks`` (what is measured), ``timing`` (how), ``peers``
(the other libraries), ``work`` (the entries), ``table`` and ``runs``. The command
``adjointbackmap bench`` calls ``runs``.
"""
