"""The plan of a computation of hyperplanes: its method and its cost."""

from dataclasses import dataclass

from adjointbackmap.display import Shown, Summary, words_of_bytes, words_of_work


@dataclass(frozen=True, repr=False)
class Plan(Shown):
    """How some hyperplanes are computed.

    Attributes:
        method: ``"adjoint"``, ``"basis"``, ``"coloured"`` or ``"windowed"``.
        vectors: Number of cotangents or tangents.
        multiply_adds: Multiply-adds of the convolutions and products.
        bytes: Size of the result.
        workspace: Estimate of the bytes that the largest batch takes while it is computed.
        cost: Multiply-adds, plus the time of steps and numbers in the same unit.
    """

    method: str
    vectors: int
    multiply_adds: int
    bytes: int
    workspace: int
    cost: int

    def _summary(self) -> Summary:
        kind = "cotangents" if self.method == "adjoint" else "tangents"
        facts = {
            kind: f"{self.vectors:,}",
            "multiply-adds": f"{self.multiply_adds / 1e9:.3g} G",
            "result": words_of_bytes(self.bytes),
            "workspace": words_of_bytes(self.workspace),
        }
        return Summary(f"Plan: {self.method}", facts)

    def __str__(self) -> str:
        kind = "cotangents" if self.method == "adjoint" else "tangents"
        work = f"{words_of_work(self.multiply_adds)}, {words_of_bytes(self.bytes)}"
        workspace = f"workspace {words_of_bytes(self.workspace)}"
        return f"{self.method}: {self.vectors:,} {kind}, {work}, {workspace}"
