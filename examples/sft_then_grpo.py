"""SFT, then GRPO, as two runs from Python: the second one starts from the model that the first one saved.

    python examples/sft_then_grpo.py

In one run the same is stages=[evaluate,sft,evaluate,grpo,evaluate,export], which also uses one adapter throughout.
"""

import sys

from reasoner import train

if __name__ == "__main__":
    more = sys.argv[1:]
    warm = train("tiny", overrides=["stages=[sft,evaluate,export]", "out=outputs/example-sft", *more])
    practised = train(
        "tiny",
        overrides=[
            "stages=[evaluate,grpo,evaluate,export]",
            f"model.name={warm.out / 'model'}",
            "model.scratch=null",
            "out=outputs/example-grpo",
            *more,
        ],
    )
    for row in (*warm.rows, *practised.rows):
        print(row["row"], f"{row['greedy_accuracy']:.1%}")
