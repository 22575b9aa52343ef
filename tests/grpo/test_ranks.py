"""Two gloo processes, each with some of the step's groups, give the advantages and counts of one process with all."""

import json
from dataclasses import asdict

from reasoner.grpo.advantages import judge
from reasoner.grpo.batch import collate
from reasoner.types import Completion, Group, Prompt, Score
from tests.two_ranks import on_two_ranks

REWARDS = [[1.0, 0.0, 0.5], [1.0, 1.0], [3.0, 1.0], [0.0, None, 0.25, 1.0]]

WORKER = """
import importlib.util, json, sys
from reasoner import world
spec = importlib.util.spec_from_file_location("here", sys.argv[1])
here = importlib.util.module_from_spec(spec)
spec.loader.exec_module(here)
world.start()
print(json.dumps([here.step(deal[world.rank()]) for deal in json.loads(sys.argv[2])]))
world.stop()
"""


def make_group(number: int) -> Group:
    rewards = REWARDS[number]
    completions = [
        Completion((7,) * n, (True,) * n, (-1.0,) * n, "", "length" if n == 4 else "stop", 0, 0)
        for n in range(1, len(rewards) + 1)
    ]
    scores = [Score(0.0, {}, {"x": "hung"}) if r is None else Score(r, {}) for r in rewards]
    return Group(Prompt(str(number), "", "", {}, (1, 2)), tuple(completions), tuple(scores))


def step(numbers: list[int]) -> dict:
    """What this rank's groups become: advantages by prompt, and the counts of the whole step."""
    judged = judge([make_group(number) for number in numbers], advantage="group", scale="batch")
    batch = collate(judged, mask_cut=True, max_completion_tokens=10, drop_dead=True)
    return {"advantages": {j.group.prompt.id: list(j.advantages) for j in judged}, "counts": asdict(batch.counts)}


def test_two_ranks_equal_one():
    """The std of scale="batch" and the normalizers are the whole step's, bit for bit, however groups are dealt out."""
    deals = [([0, 1], [2, 3]), ([2, 0, 3, 1], [])]  # the second leaves a rank with nothing
    outputs = on_two_ranks(WORKER, __file__, json.dumps(deals))
    alone = step([0, 1, 2, 3])
    for first, second in zip(*(json.loads(output.splitlines()[-1]) for output in outputs), strict=True):
        assert first["counts"] == second["counts"] == alone["counts"]
        assert {**first["advantages"], **second["advantages"]} == alone["advantages"]
    # the mutant: each rank by itself
    assert step([0, 1])["advantages"]["0"] != alone["advantages"]["0"]
    assert step([0, 1])["counts"] != alone["counts"]
