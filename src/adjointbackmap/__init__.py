"""Exact effective hyperplanes of any unit of any layer of a piecewise-affine network."""

from adjointbackmap.fold import Fold, fold
from adjointbackmap.hyperplanes import Contributions, Hyperplanes, hyperplanes
from adjointbackmap.operator import LayerOperator, operator
from adjointbackmap.pattern import ActivationPattern, record_pattern
from adjointbackmap.program import UnsupportedOperation
from adjointbackmap.trace import Biases, Layer, Network, trace
from adjointbackmap.verification import LayerCheck, dense_test, dot_test, reconstruction_test, verify

from adjointbackmap import data, models  # isort: skip

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022 - in the order of the flow
    # a module becomes a network
    "trace",
    "Network",
    "Layer",
    "Biases",
    "UnsupportedOperation",
    "fold",
    "Fold",
    # a network and an image become a linear map
    "record_pattern",
    "ActivationPattern",
    "operator",
    "LayerOperator",
    # the map becomes hyperplanes
    "hyperplanes",
    "Hyperplanes",
    "Contributions",
    # exactness
    "dot_test",
    "dense_test",
    "reconstruction_test",
    "verify",
    "LayerCheck",
    # networks and data of the study
    "models",
    "data",
]
