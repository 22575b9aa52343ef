"""Sampling and judging of a step, which overlap: what was finished is scored while the rest is still sampled."""

import time
from pathlib import Path

from reasoner.compose import compose_conf
from reasoner.config import Reward, RewardPart, validate
from reasoner.grpo.trainer import GRPOTrainer
from reasoner.metrics import Stopwatch
from reasoner.rewards.base import load_rewards
from reasoner.types import Completion, Prompt

PROMPTS = [Prompt(f"train:{i}", "", str(i), {}, (1,)) for i in range(3)]


def said(text: str) -> Completion:
    return Completion((1,), (True,), (0.0,), text, "stop", 0, 0)


class Patient:
    """An engine that goes on sampling only once what it handed over was judged; it hands over the last first, and says
    nothing of the first prompt."""

    def __init__(self, marker: Path):
        self.marker = marker

    def generate(self, prompts, sampling, *, policy_step, finished):
        found = [[said(f"{i}.{k}") for k in range(2)] for i in range(len(prompts))]
        for i in (2, 1):
            for k in (1, 0):
                finished(i, k, found[i][k])
        end = time.monotonic() + 30
        while not self.marker.exists():
            assert time.monotonic() < end, "nothing is judged before all is sampled"
            time.sleep(0.02)
        return found


def test_what_is_finished_is_judged_while_the_rest_is_sampled_and_scores_keep_their_places(tmp_path: Path):
    marker = str(tmp_path / "judged")

    def score(completion, answer):
        from pathlib import Path

        Path(marker).touch()
        return float(completion) + 100 * float(answer)

    config = validate(compose_conf("tiny").values)
    reward = Reward({"accuracy": RewardPart(fn="score")}, workers=2)
    with load_rewards(reward, functions={"score": score}, base_dir=tmp_path, columns=set()) as rewards:
        trainer = GRPOTrainer(
            config,
            policy=None,  # type: ignore[arg-type]
            engine=Patient(tmp_path / "judged"),  # type: ignore[arg-type]
            rewards=rewards,
            updater=None,  # type: ignore[arg-type]
            stop_ids=(),
            accuracy_part="accuracy",
        )
        groups = trainer._practise(PROMPTS, 0, Stopwatch())
    assert [[c.text for c in group.completions] for group in groups] == [[f"{i}.0", f"{i}.1"] for i in range(3)]
    assert [[s.total for s in group.scores] for group in groups] == [[101 * i, 101 * i + 0.1] for i in range(3)]
