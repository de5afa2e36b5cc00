"""The plan of a computation of hyperplanes: its method and its cost."""

from dataclasses import dataclass

from adjointbackmap.display import Shown, Summary, words_of_bytes, words_of_work


@dataclass(frozen=True, repr=False)
class Plan(Shown):
    """How some hyperplanes are computed.

    Attributes:
        method: ``"adjoint"``, ``"basis"``, ``"coloured"``, ``"windowed"`` or
            ``"windowed-adjoint"``.
        vectors: Number of cotangents or tangents.
        multiply_adds: Multiply-adds of the convolutions and products.
        bytes: Size of the result.
        workspace: Estimate of the bytes that the largest batch takes while it is computed.
        cost: Multiply-adds, plus the time of steps and numbers in the same unit.
        note: What limits the method; empty if nothing does.
    """

    method: str
    vectors: int
    multiply_adds: int
    bytes: int
    workspace: int
    cost: int
    note: str = ""

    @property
    def kind(self) -> str:
        """The kind of its vectors: cotangents or tangents."""
        return "cotangents" if self.method.endswith("adjoint") else "tangents"

    def _summary(self) -> Summary:
        facts = {
            self.kind: f"{self.vectors:,}",
            "multiply-adds": f"{self.multiply_adds / 1e9:.3g} G",
            "result": words_of_bytes(self.bytes),
            "workspace": words_of_bytes(self.workspace),
        }
        if self.note:
            facts["note"] = self.note
        return Summary(f"Plan: {self.method}", facts)

    def __str__(self) -> str:
        work = f"{words_of_work(self.multiply_adds)}, {words_of_bytes(self.bytes)}"
        workspace = f"workspace {words_of_bytes(self.workspace)}"
        note = f" ({self.note})" if self.note else ""
        return f"{self.method}: {self.vectors:,} {self.kind}, {work}, {workspace}{note}"
