"""Claims of several networks with the same sentence, together."""

from collections.abc import Sequence
from dataclasses import dataclass

from adjointbackmap.report.sections import Claim

MARKS = {True: "holds", False: "does not hold", None: "cannot tell"}
BEYOND = "cifar100"  # ending of the networks that are beyond the dissertation's chapters
MOST_NAMES = 3  # networks that a verdict names


@dataclass(frozen=True)
class ClaimGroup:
    """One sentence, and what was measured for each network.

    Attributes:
        text: The sentence.
        claims: A claim for each network, or one for all.
    """

    text: str
    claims: tuple[Claim, ...]

    @property
    def verdict(self) -> str:
        """For how many networks the sentence holds, and for which others it does not.

        Example:
            >>> claims = [Claim("It is.", "1", name == "a", network=name) for name in "ab"]
            >>> group_claims(claims)[0].verdict
            'holds for 1 of 2 networks, not for b'
        """
        if len(self.claims) == 1 and not self.claims[0].network:
            return MARKS[self.claims[0].holds]
        inside, beyond = self._parts
        words = _words(inside)
        if not inside:
            return f"CIFAR-100: {_words(beyond)}"
        return f"{words}. CIFAR-100: {_words(beyond)}" if beyond else words

    @property
    def _parts(self) -> tuple[list[Claim], list[Claim]]:
        """Claims about the networks of the dissertation, and those about CIFAR-100."""
        inside = [claim for claim in self.claims if not claim.network.endswith(BEYOND)]
        return inside, [claim for claim in self.claims if claim.network.endswith(BEYOND)]

    @property
    def holds(self) -> bool | None:
        """Whether it holds for every network; ``None`` if it fails for none, but cannot be told.

        Networks on CIFAR-100 count only where there are no others.
        """
        inside, beyond = self._parts
        verdicts = {claim.holds for claim in inside or beyond}
        return False if False in verdicts else None if None in verdicts else True


def _words(claims: Sequence[Claim]) -> str:
    """For how many networks some claims hold, and for which they do not."""
    names = {holds: [claim.network for claim in claims if claim.holds is holds] for holds in MARKS}
    count = len(claims)
    noun = "network" if count == 1 else "networks"
    if count > 1 and len(names[True]) == count:
        return f"holds for {'both' if count == 2 else f'all {count}'} networks"
    if len(names[False]) == count > 1:
        return f"holds for none of {count} networks"
    words = f"holds for {len(names[True])} of {count} {noun}"
    if len(names[False]) + len(names[None]) > MOST_NAMES:
        return words
    if names[False]:
        words += f", not for {', '.join(names[False])}"
    return words + (f"; cannot tell for {', '.join(names[None])}" if names[None] else "")


def group_claims(claims: Sequence[Claim]) -> list[ClaimGroup]:
    """Claims by their sentence, in the order of the first of each.

    Args:
        claims: Claims of one or more networks.
    """
    found: dict[str, list[Claim]] = {}
    for claim in claims:
        found.setdefault(claim.text, []).append(claim)
    return [ClaimGroup(text, tuple(of_text)) for text, of_text in found.items()]
