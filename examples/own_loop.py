"""The same parts without the pipeline: a loop of your own around the trainer's step, with files only where you want.

python examples/own_loop.py
"""

import sys
from pathlib import Path

from reasoner.assembly import assemble
from reasoner.compose import compose_conf
from reasoner.config import validate
from reasoner.console import Console
from reasoner.data.order import Draw, Order
from reasoner.sft import SFTTrainer
from reasoner.stages import make_trainer
from reasoner.update import Updater


def updater(parts, settings, console):
    return Updater(
        parts.policy.trainable(),
        settings.optim,
        num_steps=settings.steps,
        tokens_per_micro_batch=settings.tokens_per_micro_batch,
        say=console.say,
        save_bad_batches_to=Path("outputs/own-loop/bad_batches"),
    )


def main(overrides: list[str]) -> None:
    config = validate(compose_conf("tiny", overrides).values)
    with Console() as console:
        parts = assemble(config, base_dir=Path.cwd(), functions={}, rows=None, console=console)
        parts.policy.train_mode(dropout=True)
        warm = SFTTrainer(parts.policy, updater(parts, config.sft, console))
        examples = Draw(Order(len(parts.task.examples), config.seed), cursor=0)
        for _ in range(config.sft.steps):
            warm.step([parts.task.examples[i] for i in examples.take(config.sft.examples_per_step)])
        parts.policy.train_mode(dropout=False)
        updates = config.sft.steps  # of the policy so far: the engine's draws depend on them
        parts.engine.load_adapter(parts.policy.trainable(), updates)
        trainer = make_trainer(parts, updater(parts, config.grpo, console))
        prompts = Draw(Order(len(parts.task.prompts), config.seed), cursor=0)
        for step in range(config.grpo.steps):
            drawn = [parts.task.prompts[i] for i in prompts.take(config.grpo.prompts_per_step)]
            report = trainer.step(drawn, policy_step=updates + step)
            print(f"step {step + 1}: {report.values['reward_mean']:.2f} of {len(report.judged)} groups")
        parts.policy.eval()
        updates += config.grpo.steps
        found = parts.evaluator.run(parts.engine, parts.task.sets, policy_step=updates, progress=console.status)
        parts.policy.save(Path("outputs/own-loop/model"), parts.tokenizer, stop_ids=parts.stop_ids)
        parts.rewards.close()
        parts.engine.close()
    print({name: f"{result.accuracy:.1%}" for name, result in found.items()})


if __name__ == "__main__":
    main(sys.argv[1:])
