"""Speed and memory beside named peers: what is measured, how, against whom, and the tables; in the order of the flow.

``networks`` -> ``timing`` -> ``peers`` -> ``work`` -> ``table`` -> ``runs``, which the command ``adjointbackmap bench`` calls.
"""
