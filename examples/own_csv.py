"""Your own table: any CSV, JSONL or Parquet file whose columns fill a prompt template.

    python examples/own_csv.py

On the command line: python -m reasoner conf=tiny data.path=sums.csv data.prompt='"{left} + {right} ="'
data.answer='"{total}"' data.heldout=200 'sft.data={map: null, completion: null}'
"""

import csv
import sys
import tempfile
from pathlib import Path

from reasoner import train

if __name__ == "__main__":
    path = Path(tempfile.mkdtemp()) / "sums.csv"
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["left", "right", "total"])
        table.writerows((a, b, a + b) for a in range(30) for b in range(30))
    result = train(
        "tiny",
        overrides=[
            f"data.path={path}",
            "data.prompt='{left} + {right}='",
            "data.answer='{total}'",
            "data.heldout=200",
            "sft.data={map: null, completion: null}",
            "out=outputs/example-csv",
            *sys.argv[1:],
        ],
    )
    print(result.rows[-1]["greedy_accuracy"])
