"""Exact effective hyperplanes of any unit of any layer of a piecewise-affine network."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adjointbackmap import attacks, captum, data, examples, models, plots, spectra
    from adjointbackmap.analysis.boundaries import Analysis, Boundary, analyse, boundary
    from adjointbackmap.engine.auditing import audit
    from adjointbackmap.exactness.layer_check import LayerCheck
    from adjointbackmap.analysis.fields import EffectiveFields, Sparsity, effective_fields, sparsity
    from adjointbackmap.engine.folding import Fold, fold
    from adjointbackmap.planes.hyperplane import Contributions, Hyperplanes, hyperplanes
    from adjointbackmap.analysis.kinks import KinkDistances, kink_distances
    from adjointbackmap.engine.network import Biases, Layer, Network
    from adjointbackmap.engine.operators import LayerOperator, operator
    from adjointbackmap.engine.pattern import ActivationPattern, record_pattern
    from adjointbackmap.planes.planner import plan
    from adjointbackmap.engine.program import UnsupportedOperation
    from adjointbackmap.exactness.verification import verify
    from adjointbackmap.planes.storage import StoredPlanes, open, save
    from adjointbackmap.planes.streaming import iter_hyperplanes
    from adjointbackmap.tracing import trace
    from adjointbackmap.exactness.checks import dense_test, dot_test, reconstruction_test

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
    "plan",
    "Contributions",
    # more of them than memory holds, and on disk
    "iter_hyperplanes",
    "save",
    "open",
    "StoredPlanes",
    # exactness
    "audit",
    "dot_test",
    "dense_test",
    "reconstruction_test",
    "verify",
    "LayerCheck",
    # what they tell of an image and of a network
    "analyse",
    "Analysis",
    "boundary",
    "Boundary",
    "kink_distances",
    "KinkDistances",
    "effective_fields",
    "EffectiveFields",
    "sparsity",
    "Sparsity",
    # adversarial examples, pictures, spectra
    "attacks",
    "examples",
    "plots",
    "spectra",
    # dialects of other libraries
    "captum",
    # networks and data of the study
    "models",
    "data",
]

# Where each name is defined: torch is imported on first use, so that the command line answers --help at once.
_HOMES = {
    "tracing": ("trace",),
    "network": ("Network", "Layer", "Biases"),
    "program": ("UnsupportedOperation",),
    "folding": ("fold", "Fold"),
    "pattern": ("record_pattern", "ActivationPattern"),
    "operators": ("operator", "LayerOperator"),
    "planner": ("plan",),
    "hyperplane": ("hyperplanes", "Hyperplanes", "Contributions"),
    "streaming": ("iter_hyperplanes",),
    "store": ("save", "open", "StoredPlanes"),
    "auditing": ("audit",),
    "verification": ("dot_test", "dense_test", "reconstruction_test"),
    "counts": ("LayerCheck",),
    "runs": ("verify",),
    "analysis": ("analyse", "Analysis", "boundary", "Boundary"),
    "kinks": ("kink_distances", "KinkDistances"),
    "effective": ("effective_fields", "EffectiveFields", "sparsity", "Sparsity"),
}


_MODULES = ("attacks", "captum", "data", "examples", "models", "plots", "spectra")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return sorted(__all__)
