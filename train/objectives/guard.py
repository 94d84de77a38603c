"""The guard of a reward: sees when drafted pictures lose edges, colours or the object, before the reward says so."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SMOOTHING = 0.8
"""Share of its running mean that a draft's statistics leave in place."""
_IN_WORDS = {"edges": "density of edges", "colours": "entropy of colours", "foreground": "share of the object in the picture"}


@dataclass
class Guard:
    """Running means of the drafts' statistics, each as a share of the true views' (`statistics_of_truth`)."""

    share: float
    """A statistic has collapsed where it is below this share of what it was in the first draft, or of 1 where that was above
    1; and where it is above the inverse."""
    start: dict[str, float] = field(default_factory=dict)
    """Of the first draft: the untouched model's, but for runs that begin with another."""
    now: dict[str, float] = field(default_factory=dict)
    """Running means."""

    def look(self, found: Mapping[str, float]) -> str | None:
        """Take in what a step drafted. Returns: what has collapsed, in words; None where nothing has."""
        self.start = {**found, **self.start}
        known = {n: min(value, 2 * self._allowed(n)[1]) for n, value in found.items()}  # one outlier is no trend
        self.now = {n: SMOOTHING * self.now.get(n, value) + (1 - SMOOTHING) * value for n, value in known.items()}
        return next(filter(None, map(self._collapsed, found)), None)

    def _collapsed(self, name: str) -> str | None:
        start, now = self.start[name], self.now[name]
        low, high = self._allowed(name)
        if low <= now <= high:
            return None
        first = f"{start:.0%} in the first draft"
        return (
            f"the {_IN_WORDS[name]} of the drafted views is {now:.0%} of that of the true ones ({first}; allowed {low:.0%} to "
            f"{high:.0%})"
        )

    def _allowed(self, name: str) -> tuple[float, float]:
        start = self.start[name]
        return self.share * min(1.0, start), max(1.0, start) / self.share

    def state(self) -> dict[str, Any]:
        """As plain values, but for the share, which is the configuration's."""
        return {"start": self.start, "now": self.now}
