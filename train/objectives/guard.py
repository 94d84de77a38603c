"""The guard of a reward: ends a run whose drafted pictures lose edges, colours or the object, before the reward says so."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

FIRST = 5
"""Drafts that the later ones are compared with."""
SMOOTHING = 0.8
"""Share of its running mean that a draft's statistics leave in place."""
_IN_WORDS = {"edges": "edges", "colours": "colour entropy", "foreground": "object's share of the picture"}


@dataclass
class Guard:
    """Running means of the drafts' statistics, each as a share of the true views' (`statistics_of_truth`)."""

    share: float
    """Of what a statistic was at the start, or of 1 where it was above: below it the pictures have collapsed. Above the
    inverse, of what it was or of 1 where it was below, they have as well."""
    seen: int = 0
    """Drafts."""
    start: dict[str, float] = field(default_factory=dict)
    """Means over the first ones."""
    now: dict[str, float] = field(default_factory=dict)
    """Running means."""

    def look(self, found: Mapping[str, float]) -> str | None:
        """Take in what a step drafted. Returns: what has collapsed, in words; None where nothing has."""
        self.seen += 1
        for name, value in found.items():
            if self.seen <= FIRST:
                self.start[name] = self.start.get(name, 0.0) + (value - self.start.get(name, 0.0)) / self.seen
            self.now[name] = SMOOTHING * self.now.get(name, value) + (1 - SMOOTHING) * value
        return next(filter(None, map(self._collapsed, found)), None)

    def _collapsed(self, name: str) -> str | None:
        start, now = self.start[name], self.now[name]
        low, high = self.share * min(1.0, start), max(1.0, start) / self.share
        if low <= now <= high:
            return None
        return (
            f"the {_IN_WORDS[name]} of the drafted views is {now:.0%} of the true views' ({start:.0%} in the first drafts; "
            f"allowed {low:.0%} to {high:.0%})"
        )

    def state(self) -> dict[str, Any]:
        """As plain values, but for the share, which is the configuration's."""
        return {name: value for name, value in asdict(self).items() if name != "share"}
