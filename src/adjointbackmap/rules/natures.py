"""What a value is made by, which decides whether it is the gate of a product."""

from enum import IntEnum


class Nature(IntEnum):
    """What a value is made by, which decides whether it is the gate of a product.

    The smaller nature is the gate. Sums of squares are no gates themselves: their roots and
    inverses are norms.
    """

    GATE_ONLY = 1
    SOFTMAX = 2
    SIGMOID = 3
    NORM = 4
    TANH = 5
    ACTIVATION = 6
    SQUARES = 7
    PLAIN = 8
