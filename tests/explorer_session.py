"""A small network in the explorer, for the tests of its server and of its page."""

import torch
from torch import nn

from adjointbackmap.explorer.session import Loaded, Session
from adjointbackmap.sources import NetworkOptions, Subject

SHAPE = (3, 12, 12)
CLASSES = tuple("abcd")


class Small(nn.Module):
    """A network with a pooling and a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.fc = nn.Linear(6 * 36, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = torch.relu(self.conv1(x))
        second = torch.relu(self.conv2(first) + first)
        return self.fc(torch.max_pool2d(second, 2).flatten(1))


def small_session():
    """A session whose only traced network is the small one."""
    torch.manual_seed(0)
    module = Small().eval()
    subject = Subject(module, nn.Identity(), CLASSES, "small", SHAPE)
    made = Session(NetworkOptions(model="small"), picture="frog")
    made.loaded["small"] = Loaded(subject, subject.trace())
    return made
