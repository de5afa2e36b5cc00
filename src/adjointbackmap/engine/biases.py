"""The bias vector ``b`` of a network, whose entries have names."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adjointbackmap.display import Shown, ShownFields, Summary
from adjointbackmap.engine import showing
from adjointbackmap.engine.program import Program


@dataclass(frozen=True, repr=False)
class Bias(ShownFields):
    """One entry of the bias vector.

    Attributes:
        name: Its name.
        value: Its elements.
        slice: Their places in ``b``.
        parameter: The model's parameter with the same derivative, if there is one.
    """

    name: str
    value: Tensor
    slice: slice
    parameter: str | None


class Biases(Shown, Mapping[str, Bias]):
    """The bias vector ``b``: its entries by name, in the order of execution.

    ``len()`` is M, the number of elements: one for each scalar that the network adds.

    Example:
        >>> from adjointbackmap import trace
        >>> network = trace(torch.nn.Conv2d(3, 4, 3).eval(), torch.rand(1, 3, 8, 8))
        >>> len(network.biases), network.biases.names
        (4, ('bias',))
    """

    def __init__(self, program: Program, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.device = program.device
        self._parts: dict[str, Bias] = {}
        start = 0
        for entry in program.entries:
            stop = start + entry.value.numel()
            place = slice(start, stop)
            bias = Bias(entry.name, entry.value.clone(), place, entry.parameter)
            self._parts[entry.name] = bias
            start = stop
        self._length = start

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the entries."""
        return tuple(self._parts)

    @property
    def vector(self) -> Tensor:
        """The vector ``b`` of shape ``(M,)``."""
        parts = [p.value.flatten() for p in self._parts.values()]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=self.dtype, device=self.device)

    @property
    def labels(self) -> tuple[str, ...]:
        """A name for every element: ``conv1.bias[3]``, or ``b0`` for an entry of one element."""
        return tuple(
            f"{p.name}[{i}]" if p.value.numel() > 1 else p.name
            for p in self._parts.values()
            for i in range(p.value.numel())
        )

    def __getitem__(self, name: str) -> Bias:
        return self._parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return self._length

    def _summary(self) -> Summary:
        return showing.of_biases(self)
