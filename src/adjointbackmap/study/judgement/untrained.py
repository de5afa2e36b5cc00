"""Untrained twins: the networks as they were before training, from the same seed."""

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import nn

from adjointbackmap import models
from adjointbackmap.engine.folding import fold
from adjointbackmap.engine.network import Network
from adjointbackmap.sources import NetworkOptions, Subject, load_subject
from adjointbackmap.study.setup import Trained


@dataclass(frozen=True)
class Untrained(Trained):
    """A network as training found it, with the images and the preparation of the trained one.

    Kernels that start at zero, as in Fixup, are drawn anew: at zero no output depends on the image.
    """

    @property
    def subject(self) -> Subject:
        """The folded module at its start, and the map from pixels to its input."""
        return _subject(self.name)

    @property
    def network(self) -> Network:
        """The folded module, traced in its own input."""
        return _network(self.name)


def start_of(name: str) -> nn.Module:
    """A shipped network before its training, in eval mode; zero kernels are drawn anew.

    Args:
        name: A shipped network. Its card has the seed of its training.
    """
    card = models.card(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(card["seed"])
        model = models.build(card["network"], card["classes"])
        for parameter in model.parameters():
            if parameter.dim() > 1 and not parameter.any():
                nn.init.kaiming_normal_(parameter, nonlinearity="relu")
    return model.eval()


@cache
def _subject(name: str) -> Subject:
    trained = load_subject(NetworkOptions(name))
    folded = fold(start_of(name), torch.zeros(1, *trained.shape)).model
    return replace(trained, module=folded, title=f"{name} (untrained)")


@cache
def _network(name: str) -> Network:
    return _subject(name).trace()
