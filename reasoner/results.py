"""What a run has measured so far: the rows of eval.json with each problem's verdict, the gains between them, and which
checkpoint of GRPO scored best."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

from reasoner.evaluate import ProblemResult, SetResult, paired_gain
from reasoner.intervals import Gain


@dataclass(frozen=True, slots=True)
class Best:
    """The checkpoint of a stage that scored best on held-out problems, of those that were measured on the way.

    >>> Best("03-grpo-000150", step=150, score=0.612, sets=("validation",), of=6)
    """

    name: str  # of the checkpoint and of its row
    step: int
    score: float  # greedy accuracy, the mean over the sets
    sets: tuple[str, ...]
    of: int  # checkpoints that were measured

    def __str__(self) -> str:
        chosen = f"{self.name}, the best of {self.of} by held-out accuracy"
        return f"{chosen} ({self.score:.1%} greedy on {' and '.join(self.sets)})"


@dataclass(frozen=True, slots=True)
class Results:
    """Measured rows in order. `rows` are eval.json's; `sets[i]` are row i's problems by set name, one entry an
    evaluation."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[tuple[str, Mapping[str, SetResult]]] = field(default_factory=list)

    @classmethod
    def from_files(cls, rows: Iterable[dict[str, Any]], problem_rows: Iterable[Mapping[str, Any]]) -> Self:
        """What eval.json and eval_problems.jsonl hold, to go on from."""
        between = (line for line in problem_rows if "step" not in line)
        return cls(list(rows), [(row, sets) for (_, row), sets in sorted(sets_of_rows(between).items())])

    def gains(self) -> dict[tuple[str, str, str], Gain]:
        """(earlier row, later row, set) -> the paired change of greedy accuracy, for rows that follow one another."""
        pairs = [(a, b) for a, b in zip(self.evaluations, self.evaluations[1:], strict=False) if b[0] != "export"]
        return {
            (before, after, name): paired_gain(old[name].problems, new[name].problems)
            for (before, old), (after, new) in pairs
            for name in new
            if name in old
        }

    def best(self, stage_index: int) -> Best | None:
        """The best checkpoint of the stage; None where none was measured on the way."""
        return best_of(self.rows, stage_index)

    def sentences(self) -> list[str]:
        """The gains in words; an SFT row below its base row is said aloud, and so is a score that was chosen."""
        gains = self.gains()
        said = [f"{after} against {before} on {name}: {gain}" for (before, after, name), gain in gains.items()]
        said += [
            f"warning: SFT made {name} worse, its row lies below base's: fewer sft.steps, a lower sft.optim.lr, or no "
            "sft in stages"
            for (_, after, name), gain in gains.items()
            if after == "sft" and gain.points < 0
        ]
        measured = {row["set"] for row in self.rows if "step" not in row}
        for stage_index in sorted({row["stage_index"] for row in self.rows if "step" in row}):
            best = self.best(stage_index)
            assert best is not None
            for name in (name for name in best.sets if name in measured):
                said.append(
                    f"note: step {best.step} was chosen by its score on {name}, so that score is optimistic: with "
                    "data.validation=200 the choice is made on rows of its own"
                )
        return said


def sets_of_rows(problem_rows: Iterable[Mapping[str, Any]]) -> dict[tuple[int, str], dict[str, SetResult]]:
    """(stage index, row) -> set -> its problems, of the lines of eval_problems.jsonl."""
    names = [f.name for f in fields(ProblemResult)]
    found: dict[tuple[int, str], dict[str, list[ProblemResult]]] = {}
    for line in problem_rows:
        sets = found.setdefault((line["stage_index"], line["row"]), {})
        known: dict[str, Any] = {name: line[name] for name in names if name in line}
        known |= {name: tuple(value) for name, value in known.items() if isinstance(value, list)}
        sets.setdefault(line["set"], []).append(ProblemResult(**known))
    return {
        row: {name: SetResult(name, tuple(problems)) for name, problems in sets.items()} for row, sets in found.items()
    }


def best_of(rows: Iterable[Mapping[str, Any]], stage_index: int) -> Best | None:
    """The best of eval.json's rows that have a step of this stage: by greedy accuracy, then by sampled accuracy, then
    the earlier one. With several sets their mean counts."""
    by_step: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["stage_index"] == stage_index and "step" in row:
            by_step.setdefault(row["step"], []).append(row)
    if not by_step:
        return None

    def mean(step: int, key: str) -> float:
        return sum(row.get(key) or 0.0 for row in by_step[step]) / len(by_step[step])

    step = max(by_step, key=lambda step: (mean(step, "greedy_accuracy"), mean(step, "sampled_accuracy"), -step))
    chosen = by_step[step]
    sets = tuple(row["set"] for row in chosen)
    return Best(chosen[0]["row"], step, mean(step, "greedy_accuracy"), sets, len(by_step))
