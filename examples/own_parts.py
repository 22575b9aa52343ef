"""Parts of your own in the main job: a loss, what samples, and what watches. Everything else stays as the conf says.

    python examples/own_parts.py

A loss in a module works on the command line too: python -m reasoner conf=tiny +grpo.loss._target_=my_losses.reinforce
"""

import sys

from reasoner import train
from reasoner.grpo.losses import LossInputs, reduce
from reasoner.rollout.hf import HfEngine
from reasoner.update import LossOutput


def reinforce(inputs: LossInputs) -> LossOutput:
    """REINFORCE on the group's advantages: minus advantage x logprob, a mean over the trained tokens of the step."""
    terms = -inputs.advantages * inputs.weights * inputs.logprobs
    return LossOutput(reduce(terms, inputs, "tokens"), "tokens", {})


class CountingEngine(HfEngine):
    """Samples as `rollout=hf` does, and counts the prompts."""

    asked = 0

    def generate(self, prompts, sampling, **told):
        """See `Engine.generate`."""
        CountingEngine.asked += len(prompts)
        return super().generate(prompts, sampling, **told)


def make_engine(policy, decode, *, max_context):
    """Called once, when the model is loaded."""
    return CountingEngine(policy, decode, max_context=max_context, max_sequences=256)


def watch(row):
    """Called with each row of metrics.jsonl."""
    if row["stage"] == "grpo" and row["step"] % 50 == 0:
        print(f"step {row['step']}: reward {row['reward_mean']:.2f}, entropy {row['entropy']:.2f}")


if __name__ == "__main__":
    result = train("tiny", loss=reinforce, engine=make_engine, callback=watch, overrides=sys.argv[1:])
    print(f"{result.rows[-1]['greedy_accuracy']:.1%} after {CountingEngine.asked:,} prompts")
