"""Progress in lines, for output that is not a terminal: a file, or the log of a cluster."""

import sys
import time
from types import SimpleNamespace
from typing import Any

STEP = 0.1  # of the work, between two lines of the same step
SECONDS = 2.0  # least time between two lines of the same step


class LinesOfProgress:
    """What :class:`rich.progress.Progress` is for a terminal, with one task."""

    def __init__(self, description: str) -> None:
        self.job = 0
        self.tasks = {self.job: SimpleNamespace(description=description)}
        self._told = 0.0
        self._when = time.monotonic()

    def update(
        self, job: int, completed: float | None = None, description: str | None = None
    ) -> None:
        """Write a line where a step begins, and after each tenth of it."""
        task = self.tasks[job]
        share = self._told if completed is None else completed
        now = time.monotonic()
        is_new = description is not None and description != task.description
        is_far = share - self._told >= STEP
        if description is not None:
            task.description = description
        if (is_new or is_far) and now - self._when >= SECONDS:
            self._told = share
            self._when = now
            print(f"{task.description} ({100 * share:.0f} % done)", file=sys.stderr, flush=True)

    def reset(self, job: int, description: str | None = None, **_: Any) -> None:
        """Begin again, with another description."""
        self._told = 0.0
        self.update(job, 0.0, description)
