"""One small class per operation: its gates, its linear forward, its adjoint, its receptive field."""

from adjointbackmap.rules import joining, kernels, linear, masks, moving, padding, piecewise, pooling
from adjointbackmap.rules.base import RULES, Builder, Constant, Entry, Mask, Refused, Rule, Value
from adjointbackmap.rules.field import Axis, Field, field_size

__all__ = [
    "RULES",
    "Axis",
    "Builder",
    "Constant",
    "Entry",
    "Field",
    "Mask",
    "Refused",
    "Rule",
    "Value",
    "field_size",
    "joining",
    "kernels",
    "linear",
    "masks",
    "moving",
    "padding",
    "piecewise",
    "pooling",
]
