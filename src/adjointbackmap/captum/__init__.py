"""Hyperplanes and exact integrated gradients through an interface like that of Captum."""

from adjointbackmap.captum.adjoint import AdjointBackMap
from adjointbackmap.captum.integrated import ExactIntegratedGradients, SamplingError

__all__ = ["AdjointBackMap", "ExactIntegratedGradients", "SamplingError"]
