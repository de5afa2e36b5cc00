"""What is trained, how its steps are computed, and how far it is."""

from dataclasses import dataclass, field

import torch

from adjointbackmap.training.recipes import Recipe


@dataclass(frozen=True)
class Task:
    """What is trained. A checkpoint continues only the task that began it."""

    network: str
    dataset: str
    seed: int = 0
    recipe: Recipe = field(default_factory=Recipe)
    start: str | None = None  # weights to begin from: the safetensors file of an earlier run


@dataclass(frozen=True)
class Setting:
    """How a step is computed: memory layout and the precision of the autocast."""

    channels_last: bool
    bfloat16: bool

    @property
    def layout(self) -> torch.memory_format:
        """The memory format of images and kernels."""
        return torch.channels_last if self.channels_last else torch.contiguous_format


@dataclass(frozen=True)
class Progress:
    """State after a step.

    Attributes:
        step: Number of finished steps.
        steps: Number of all steps.
        loss: Loss of the step.
        validation: Last validation accuracy; ``None`` before the first one.
    """

    step: int
    steps: int
    loss: float
    validation: float | None
