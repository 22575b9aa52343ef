"""GRPO, arXiv:2402.03300: `step` is one policy update, and its lines are the algorithm.

Everything that varies stands in one of its lines: the engine samples, plain functions judge, `judge` makes
advantages, `collate` packs, the
objective adds a loss to KL and entropy, and the engine gets the new weights. Left out: which prompts come next, files
and the console
(pipeline.py), a critic, and samples older than one step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from reasoner.config import Config, build
from reasoner.errors import GuardTripped
from reasoner.grpo.advantages import JudgedGroup, judge, judged_dead
from reasoner.grpo.batch import PackedBatch, TrainBatch, collate, loss_inputs, pack, train_batch
from reasoner.grpo.kl import ESTIMATORS, PENALTY, k3, penalized, sequence_kl
from reasoner.grpo.losses import Loss, reduce
from reasoner.grpo.mismatch import Mismatch
from reasoner.grpo.resample import More, Sampled, sample
from reasoner.metrics import Stopwatch, Sums, peak_gib
from reasoner.models.policy import Policy
from reasoner.rewards.base import Rewards, Waiting
from reasoner.rollout.engine import Engine, Finished, Sampling, asleep
from reasoner.rollout.single_turn import rollout
from reasoner.types import Completion, Group, Prompt
from reasoner.update import LossOutput, Updater, UpdateResult


def no_more(count: int) -> Sequence[Prompt]:
    """No further prompts."""
    return ()


def sampling_of(config: Config, stop_ids: tuple[int, ...]) -> Sampling:
    """How practice samples."""
    return Sampling(
        config.rollout.temperature,
        config.grpo.max_completion_tokens,
        config.grpo.completions_per_prompt,
        stop_ids,
        config.seed,
    )


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a step sampled on this rank, and its numbers over all ranks, named as in `metrics.NAMES`."""

    judged: tuple[JudgedGroup, ...]
    values: dict[str, float]


class GRPOTrainer:
    """Practice against rewards: samples groups of completions and raises the probability of those better than their
    group."""

    def __init__(
        self,
        config: Config,
        *,
        policy: Policy,
        engine: Engine,
        rewards: Rewards,
        updater: Updater,
        stop_ids: tuple[int, ...],
        accuracy_part: str,
        loss: Loss | None = None,
    ):
        """`loss` stands in place of the one that config.grpo.loss names."""
        self.settings = config.grpo
        self.max_failed_share = config.reward.max_failed_share
        self.policy = policy
        self.engine = engine
        self.rewards = rewards
        self.updater = updater
        self.accuracy_part = accuracy_part
        self.loss: Loss = loss or build(config.grpo.loss)
        self.mismatch = Mismatch(config.grpo.mismatch, config.grpo.mismatch_level, config.grpo.mismatch_cap)
        self.sampling = sampling_of(config, stop_ids)
        self.kl_in_loss = config.grpo.kl_in == "loss" and config.grpo.kl_coef > 0
        self.kl_in_reward = config.grpo.kl_in == "reward" and config.grpo.kl_coef > 0

    def step(self, prompts: Sequence[Prompt], *, policy_step: int, more: More = no_more) -> StepReport:
        """One policy update from this rank's prompts: sample, judge, learn. `more` gives further prompts to
        grpo.resample.

        Raises GuardTripped where too many rewards failed, the engine disagrees with the trainer, or gradients stay
        non-finite.
        """
        watch = Stopwatch()
        sampled = sample(
            prompts, lambda ps: self._practise(ps, policy_step, watch), more, rounds=self.settings.resample
        )
        with asleep(self.engine):
            with watch.measure("logprobs_s"):
                judged = self._judge(sampled.kept)
                batch = self._with_logprobs(judged)
            with watch.measure("update_s"):
                updates = [self.updater.run(batch, self._objective) for _ in range(self.settings.inner_steps)]
        with watch.measure("sync_s"):
            self.engine.load_adapter(self.policy.trainable(), policy_step + 1)
        report = self._report(sampled, judged, updates, watch)
        return StepReport((*judged, *(judged_dead(group) for group in sampled.dropped)), report)

    def _practise(self, prompts: Sequence[Prompt], policy_step: int, watch: Stopwatch) -> list[Group]:
        """Groups of completions with their scores; judging begins while other completions are still sampled."""
        waiting: dict[tuple[int, int], Waiting] = {}

        def finished(i: int, k: int, completion: Completion) -> None:
            waiting[i, k] = self.rewards.submit(prompts[i], completion)

        def generate(ps: Sequence[Prompt], finished: Finished) -> list[list[Completion]]:
            return self.engine.generate(ps, self.sampling, policy_step=policy_step, finished=finished)

        with watch.measure("generate_s"):
            completions = rollout(prompts, generate, finished)
        with watch.measure("reward_s"):
            for i, several in enumerate(completions):
                for k, completion in enumerate(several):
                    if (i, k) not in waiting:  # its rollout said nothing of it
                        finished(i, k, completion)
            scores = iter(self.rewards.collect([waiting[place] for place in sorted(waiting)]))
            groups = [
                Group(prompt, tuple(several), tuple(next(scores) for _ in several))
                for prompt, several in zip(prompts, completions, strict=True)
            ]
            self._guard_rewards(groups)
        return groups

    def _guard_rewards(self, groups: Sequence[Group]) -> None:
        failures = [reason for g in groups for s in g.scores for reason in s.failures.values()]
        sums = Sums()
        sums.add("share", sum(s.failed for g in groups for s in g.scores), sum(len(g.scores) for g in groups))
        share = sums.values()["share"]
        if share > self.max_failed_share:
            raise GuardTripped(
                f"{share:.0%} of the step's rewards failed, more than reward.max_failed_share={self.max_failed_share}"
                + (f"; the first: {failures[0]}" if failures else "")
            )

    def _judge(self, groups: Sequence[Group]) -> list[JudgedGroup]:
        if self.kl_in_reward:
            batch = pack(groups, self.policy.device, share_prompts=self.policy.shares_prompts)
            kl = sequence_kl(batch, self._logprobs(batch), self._reference_logprobs(batch))
            groups = penalized(groups, kl, self.settings.kl_coef)
        return judge(groups, advantage=self.settings.advantage, scale=self.settings.advantage_scale)

    def _with_logprobs(self, judged: Sequence[JudgedGroup]) -> TrainBatch:
        batch = collate(
            judged,
            mask_cut=self.settings.mask_cut,
            max_completion_tokens=self.settings.max_completion_tokens,
            drop_dead=not self.kl_in_loss and self.settings.entropy_coef == 0,
            device=self.policy.device,
            share_prompts=self.policy.shares_prompts,
        )
        return train_batch(
            batch,
            old_logprobs=self._logprobs(batch) if self.settings.inner_steps > 1 else None,
            ref_logprobs=self._reference_logprobs(batch) if self.kl_in_loss else None,
        )

    @torch.no_grad()
    def _logprobs(self, batch: PackedBatch) -> Tensor:
        """The policy's logprobs of the whole batch, without gradient: [N]."""
        pieces = batch.split(self.updater.tokens_per_micro_batch)
        found = [self.policy.logprobs(piece, temperature=self.sampling.temperature).logprobs for piece in pieces]
        return torch.cat(found) if found else torch.zeros(0, device=self.policy.device)

    def _reference_logprobs(self, batch: PackedBatch) -> Tensor:
        with self.policy.reference():
            return self._logprobs(batch)

    def _objective(self, piece: TrainBatch) -> LossOutput:
        """Loss + kl_coef x KL - entropy_coef x entropy, all reduced as the loss is."""
        logprobs = self.policy.logprobs(piece, temperature=self.sampling.temperature)
        inputs, metrics = self.mismatch(loss_inputs(piece, logprobs))
        output = self.loss(inputs)
        total = output.sum
        metrics = {**metrics, **output.metrics, "entropy": inputs.entropy.detach().sum()}
        if piece.ref_logprobs is not None:
            ref_logprobs = piece.trained(piece.ref_logprobs)
            kl = ESTIMATORS[self.settings.kl_estimator](inputs.logprobs, ref_logprobs)
            total = total + self.settings.kl_coef * reduce(kl, inputs, output.normalizer)
            metrics["kl"] = k3(inputs.logprobs.detach(), ref_logprobs).sum()
        if self.settings.entropy_coef:
            total = total - self.settings.entropy_coef * reduce(inputs.entropy, inputs, output.normalizer)
        return replace(output, sum=total, metrics=metrics)

    def _report(
        self, sampled: Sampled, judged: Sequence[JudgedGroup], updates: Sequence[UpdateResult], watch: Stopwatch
    ) -> dict[str, float]:
        # Means speak of the first round: later ones are made of what had no signal, and would flatter.
        pairs = [(c, s) for group in sampled.first for c, s in zip(group.completions, group.scores, strict=True)]
        valid = [score for _, score in pairs if not score.failed]
        sums = Sums()
        sums.add("reward_mean", sum(score.total for score in valid), len(valid))
        sums.add("solved_share", sum(score.parts.get(self.accuracy_part) == 1 for score in valid), len(valid))
        for name in self.rewards.part_names:
            present = [score.parts[name] for score in valid if name in score.parts]
            sums.add(f"reward/{name}", sum(present), len(present))
        sums.count("useful_groups", sum(not group.dead for group in judged))
        sums.count("groups", len(judged))
        sums.count("reward_failures", len(pairs) - len(valid))
        everything = (*sampled.kept, *sampled.dropped)
        sums.count("tokens", sum(len(c.token_ids) for group in everything for c in group.completions))
        if self.settings.resample:
            sums.count("resampled_groups", len(everything) - len(sampled.first))
        num_tokens = sum(len(completion.token_ids) for completion, _ in pairs)
        sums.add("completion_tokens_mean", num_tokens, len(pairs))
        sums.add("cut_share", sum(completion.finish_reason == "length" for completion, _ in pairs), len(pairs))
        if self.kl_in_reward:
            charged = [-s.parts[PENALTY] for group in judged for s in group.group.scores]
            sums.add("kl", sum(charged), sum(len(c.token_ids) for group in sampled.kept for c in group.completions))
        values = sums.values()
        sampled_tokens = values.pop("tokens")
        learned = _over_inner_steps(updates)
        if learned.get("logprob_gap_mean", 0.0) > self.settings.max_logprob_gap:
            raise GuardTripped(
                f"the engine's logprobs are {learned['logprob_gap_mean']:.3f} nats from the trainer's on average, more "
                f"than grpo.max_logprob_gap={self.settings.max_logprob_gap}: it samples from other weights or another "
                "distribution"
            )
        step_s = watch.elapsed_s()
        return {
            **dict.fromkeys(("entropy", "logprob_gap_mean", "logprob_gap_max", "ratio_max"), float("nan")),
            "kl": 0.0,
            **learned,
            **values,
            **watch.seconds,
            "grad_norm": updates[-1].grad_norm,
            "lr": updates[-1].lr,
            "step_s": step_s,
            "tokens_per_s": sampled_tokens / step_s,
            "peak_gib": peak_gib(),
        }


def _over_inner_steps(updates: Sequence[UpdateResult]) -> dict[str, float]:
    names = dict.fromkeys(name for update in updates for name in update.metrics)
    found = {name: [update.metrics[name] for update in updates if name in update.metrics] for name in names}
    return {name: max(v) if name.endswith("_max") else sum(v) / len(v) for name, v in found.items()}
