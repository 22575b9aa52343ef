"""What a count of right answers says: intervals of a share and of a paired change, McNemar's test, pass@k, majority
vote, and how many problems a change would need to be seen.

Plain formulas with their sources. Left out: resampling, and what several seeds of training would add, which no set of
problems can tell.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from reasoner.words import plural

Z95 = 1.959963984540054
Z80 = 0.8416212335729143  # a chance of about 80% to see a change that is there
LEVEL = 0.05
HALVINGS = 60  # of an interval of length 1: below the last bit of a float


@dataclass(frozen=True, slots=True)
class Gain:
    """The change of greedy accuracy between two rows on the same problems, in points, with its 95% interval.

    >>> str(Gain.of(gained=110, lost=56, problems=1319))
    '+4.1 points, 95% 2.2 to 6.0, 1,319 problems'
    """

    points: float
    low: float
    high: float
    problems: int
    gained: int  # wrong before, right after
    lost: int

    @classmethod
    def of(cls, gained: int, lost: int, problems: int) -> "Gain":
        """The gain of these counts: Tango's interval, whose verdict is McNemar's up to rounding and small counts."""
        assert 0 < problems >= gained + lost, "two rows share their problems"
        low, high = paired_interval(gained, lost, problems)
        return cls(100 * (gained - lost) / problems, 100 * low, 100 * high, problems, gained, lost)

    @property
    def p_value(self) -> float:
        """McNemar's, exact: the chance of so uneven a split of the changed answers where nothing changed."""
        return mcnemar(self.gained, self.lost)

    @property
    def is_real(self) -> bool:
        """Whether interval and exact test agree that it is not 0."""
        return (self.low > 0 or self.high < 0) and self.p_value < LEVEL

    def __str__(self) -> str:
        said = f"{self.points:+.1f} points, 95% {self.low:.1f} to {self.high:.1f}, {plural(self.problems, 'problem')}"
        return said if self.is_real else f"{said} (can't tell from 0: {self.needed_words()})"

    def needed_words(self) -> str:
        """How many problems it would take, as the end of a sentence; more than those that didn't show it."""
        share = (self.gained + self.lost) / self.problems
        if self.gained != self.lost:
            needed = problems_needed(abs(self.points) / 100, share)
            return f"if it is real, about {_rounded(max(needed, self.problems + 1)):,} problems would show it"
        return f"to show 2 points, about {_rounded(problems_needed(0.02, max(share, 0.05))):,} problems are needed"


def wilson(num_right: int, num_problems: int) -> tuple[float, float]:
    """95% interval of a share (Wilson, J. Am. Stat. Assoc. 22, 1927): right also near 0 and 1 and for few problems."""
    if num_problems == 0:
        return 0.0, 1.0
    share, z2 = num_right / num_problems, Z95**2 / num_problems
    centre = (share + z2 / 2) / (1 + z2)
    half = Z95 * math.sqrt(share * (1 - share) / num_problems + z2 / (4 * num_problems)) / (1 + z2)
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_interval(gained: int, lost: int, num_problems: int) -> tuple[float, float]:
    """95% interval of (gained - lost) / problems: Tango's score interval (Statist. Med. 17, 1998).

    The changes that the score test does not refuse; at 0 that is McNemar's test. It holds for few changed answers too,
    where the usual +- 1.96 standard errors is too narrow (and has no width at all where nothing changed).
    """
    change = (gained - lost) / num_problems

    def refused(assumed: float) -> bool:
        return abs(score_statistic(gained, lost, num_problems, assumed)) > Z95

    return _edge(change, -1.0, refused), _edge(change, 1.0, refused)


def score_statistic(gained: int, lost: int, num_problems: int, change: float) -> float:
    """Tango's z of the hypothesis that the true change is `change`, -1 to 1: its eq. 7, with the likeliest share of
    lost answers under it."""
    n = num_problems
    b = (2 * n - gained + lost) * change - gained - lost
    share_lost = (math.sqrt(b * b + 8 * n * lost * change * (1 - change)) - b) / (4 * n)
    variance = n * (2 * share_lost + change * (1 - change))
    distance = gained - lost - n * change
    if variance <= 0:
        return 0.0 if distance == 0 else math.copysign(math.inf, distance)
    return distance / math.sqrt(variance)


def _edge(inside: float, outside: float, refused: Callable[[float], bool]) -> float:
    """Where, between `inside` and `outside`, `refused` begins to hold; `outside` where it never does."""
    if not refused(outside):
        return outside
    for _ in range(HALVINGS):
        middle = (inside + outside) / 2
        inside, outside = (inside, middle) if refused(middle) else (middle, outside)
    return inside


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided p of McNemar's test (Psychometrika 12, 1947), exact: twice the binomial tail of the rarer change."""
    changed = gained + lost
    tail = sum(math.comb(changed, i) for i in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**changed)


def problems_needed(change: float, share_changed: float) -> int:
    """Problems at which McNemar's test at 5% sees a true `change` with a chance of about 80%, where `share_changed` of
    the answers change (Connor, Biometrics 43, 1987)."""
    changed = max(share_changed, change)
    root = Z95 * math.sqrt(changed) + Z80 * math.sqrt(changed - change**2)
    return math.ceil((root / change) ** 2)


def _rounded(number: int) -> int:
    """Two digits of it: more would be pretended."""
    step = 10 ** max(0, len(str(number)) - 2)
    return -(-number // step) * step


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Unbiased chance that one of k samples is right: 1 - C(n - c, k) / C(n, k), arXiv:2107.03374 eq. 1."""
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def majority_at_k(answers: Sequence[str | None], right: Sequence[bool], k: int) -> float:
    """Chance that the most frequent answer of k samples is right (self-consistency, arXiv:2203.11171), over the
    samples' disjoint blocks of k.

    Right samples are one answer, however they are written; wrong ones are alike where their texts are. A sample without
    an answer (None) has no vote. Of answers that are equally frequent one is drawn.
    """
    won: list[float] = []
    for start in range(0, len(answers) - k + 1, k):
        block = list(zip(answers[start : start + k], right[start : start + k], strict=True))
        votes = Counter("" if good else f"wrong {said}" for said, good in block if good or said is not None)
        top = max(votes.values(), default=0)
        winners = [name for name, count in votes.items() if count == top]
        won.append(winners.count("") / len(winners) if winners else 0.0)
    return sum(won) / len(won)
