"""Maps for competition problems, MATH-500 and AIME: `data.map=reasoner.data.benchmarks:competition`."""

from collections.abc import Mapping
from typing import Any

from reasoner.data.columns import cell_text

GROUPS = ("level", "subject", "type", "year")  # what results can be told apart by


def competition(row: Mapping[str, Any]) -> dict[str, Any]:
    """Rows with `problem` and a bare `answer`: the columns question and answer, and those of GROUPS that are there.

    >>> competition({"problem": "2+2?", "answer": "4", "level": 1, "solution": "2+2=4, so \\\\boxed{4}"})
    {'question': '2+2?', 'answer': '4', 'level': 1}
    """
    kept = {name: row[name] for name in GROUPS if name in row}
    return {"question": row["problem"], "answer": cell_text(row["answer"]), **kept}
