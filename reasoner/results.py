"""What a run has measured so far: the rows of eval.json with each problem's verdict, and the gains between them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

from reasoner.evaluate import Gain, ProblemResult, SetResult, paired_gain


@dataclass(frozen=True, slots=True)
class Results:
    """Measured rows in order. `rows` are eval.json's; `sets[i]` are row i's problems by set name, one entry an
    evaluation."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[tuple[str, Mapping[str, SetResult]]] = field(default_factory=list)

    @classmethod
    def from_files(cls, rows: Iterable[dict[str, Any]], problem_rows: Iterable[Mapping[str, Any]]) -> Self:
        """What eval.json and eval_problems.jsonl hold, to go on from."""
        names = [f.name for f in fields(ProblemResult)]
        found: dict[tuple[int, str], dict[str, list[ProblemResult]]] = {}
        for line in problem_rows:
            sets = found.setdefault((line["stage_index"], line["row"]), {})
            sets.setdefault(line["set"], []).append(ProblemResult(**{name: line[name] for name in names}))
        evaluations: list[tuple[str, Mapping[str, SetResult]]] = [
            (row, {name: SetResult(name, tuple(problems)) for name, problems in sets.items()})
            for (_, row), sets in sorted(found.items())
        ]
        return cls(list(rows), evaluations)

    def gains(self) -> dict[tuple[str, str, str], Gain]:
        """(earlier row, later row, set) -> the paired change of greedy accuracy, for rows that follow one another."""
        pairs = [(a, b) for a, b in zip(self.evaluations, self.evaluations[1:], strict=False) if b[0] != "export"]
        return {
            (before, after, name): paired_gain(old[name].problems, new[name].problems)
            for (before, old), (after, new) in pairs
            for name in new
            if name in old
        }

    def sentences(self) -> list[str]:
        """The gains in words; an SFT row below its base row is said aloud."""
        gains = self.gains()
        said = [f"{after} against {before} on {name}: {gain}" for (before, after, name), gain in gains.items()]
        return said + [
            f"warning: SFT made {name} worse, its row lies below base's: fewer sft.steps, a lower sft.optim.lr, or no "
            "sft in stages"
            for (_, after, name), gain in gains.items()
            if after == "sft" and gain.points < 0
        ]
