"""The update loop: dividing once, whatever the cut, the memory or the number of ranks; and standing still where there
is nothing to learn."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from reasoner.config import Optim
from reasoner.errors import GuardTripped, OutOfMemory
from reasoner.update import LossOutput, StepCounts, Updater, learning_rate
from tests.two_ranks import on_two_ranks

CUDA = torch.cuda.is_available()
SGD = Optim(lr=1.0, warmup_steps=0, max_grad_norm=1e9, optimizer={"_target_": "torch.optim.SGD"})


@dataclass(frozen=True)
class Rows:
    """Sequences of a toy task: each token holds one number, its loss is number x weight."""

    sequences: tuple[Tensor, ...]
    counts: StepCounts

    @classmethod
    def of(cls, *sequences: list[float]) -> "Rows":
        tensors = tuple(torch.tensor(s, dtype=torch.float64) for s in sequences)
        return cls(tensors, StepCounts(sum(map(len, sequences)), len(sequences), 1, 10.0 * len(sequences)))

    def to(self, device: str) -> "Rows":
        return replace(self, sequences=tuple(sequence.to(device) for sequence in self.sequences))

    @property
    def token_ids(self) -> Tensor:
        return torch.cat(self.sequences or (torch.zeros(0, dtype=torch.float64),))

    @property
    def completion_mask(self) -> Tensor:
        return torch.ones_like(self.token_ids, dtype=torch.bool)

    def split(self, max_tokens: int) -> list["Rows"]:
        pieces: list[list[Tensor]] = []
        for sequence in self.sequences:
            if pieces and sum(map(len, pieces[-1])) + len(sequence) <= max_tokens:
                pieces[-1].append(sequence)
            else:
                pieces.append([sequence])
        return [replace(self, sequences=tuple(piece)) for piece in pieces]


def make(
    optim: Optim = SGD, tokens: int = 100, said: list[str] | None = None, tmp: Path = Path()
) -> tuple[Updater, Parameter]:
    weight = Parameter(torch.zeros(2, dtype=torch.float64))
    say = said.append if said is not None else lambda line: None
    updater = Updater(
        {"w": weight}, optim, num_steps=10, tokens_per_micro_batch=tokens, say=say, save_bad_batches_to=tmp / "bad"
    )
    return updater, weight


def token_loss(weight: Parameter, normalizer: str = "tokens"):
    def loss(piece: Rows) -> LossOutput:
        values = piece.token_ids * weight[0] + piece.token_ids.square() * weight[1]
        return LossOutput(
            values.sum(), normalizer, {"value": piece.token_ids.sum(), "value_max": piece.token_ids.max()}
        )

    return loss


def test_b1_a_split_never_changes_the_mean():
    """Micro-batches of 1 token (2.0) and 9 tokens (1.0): 11 / 10 = 1.1, not the mean of means 1.5."""
    updater, weight = make(tokens=1)
    result = updater.run(Rows.of([2.0], [1.0] * 9), token_loss(weight))
    assert weight[0].item() == pytest.approx(-1.1, abs=1e-12)
    assert result.metrics["value"] == pytest.approx(1.1)


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a GPU")])]
)
def test_a_metric_may_be_a_vector_of_one_and_lie_on_the_host(device: str):
    weight = Parameter(torch.zeros(1, device=device))

    def loss(piece: Rows) -> LossOutput:
        tokens = piece.token_ids
        return LossOutput((tokens * weight).sum(), "tokens", {"value": tokens.sum()[None], "one_max": torch.tensor(1)})

    updater = Updater(
        {"w": weight}, SGD, num_steps=1, tokens_per_micro_batch=1, say=print, save_bad_batches_to=Path("nowhere")
    )
    assert updater.run(Rows.of([2.0], [1.0]).to(device), loss).metrics == {"value": 1.5, "one_max": 1.0}


@pytest.mark.parametrize(("normalizer", "divisor"), [("tokens", 10), ("sequences", 2), ("constant", 20)])
def test_b2_each_normalizer_divides_by_its_own_count(normalizer: str, divisor: int):
    updater, weight = make(tokens=3)
    updater.run(Rows.of([2.0], [1.0] * 9), token_loss(weight, normalizer))
    assert weight[0].item() == pytest.approx(-11 / divisor, abs=1e-12)


def test_c13_one_two_or_four_micro_batches_give_one_gradient():
    batch = Rows.of([0.3, 0.1], [0.7], [1.1, -0.4, 0.2], [0.9])
    weights = []
    for tokens in (100, 3, 1):
        updater, weight = make(tokens=tokens)
        updater.run(batch, token_loss(weight))
        weights.append(weight.detach().clone())
    assert (weights[0] - weights[1]).abs().max() < 1e-10
    assert (weights[0] - weights[2]).abs().max() < 1e-10


def test_c17_the_gradient_is_clipped_once_and_the_schedule_counts_steps():
    updater, weight = make(replace(SGD, max_grad_norm=1.0), tokens=1)
    result = updater.run(Rows.of([3.0], [4.0]), token_loss(weight))
    gradient = torch.tensor([3.5, 12.5], dtype=torch.float64)  # (3 + 4) / 2, (9 + 16) / 2
    assert result.grad_norm == pytest.approx(gradient.norm().item())
    assert torch.allclose(weight.detach(), -gradient / gradient.norm(), atol=1e-6)
    updater.run(Rows.of([1.0], [1.0], [1.0], [1.0]), token_loss(weight))
    assert updater.step_index == 2


def test_c21_metrics_of_a_split_batch_equal_the_unsplit_ones():
    batch = Rows.of([0.3, 0.1], [0.7], [1.1, -0.4, 0.2])
    whole, parts = (make(tokens=tokens)[0] for tokens in (100, 1))
    one = whole.run(batch, token_loss(whole.parameters["w"]))
    many = parts.run(batch, token_loss(parts.parameters["w"]))
    assert one.metrics == pytest.approx(many.metrics)
    assert one.metrics["value_max"] == 1.1


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_maximum_that_is_not_a_number_is_not_lost_among_others(place: int):
    updater, weight = make(tokens=1)
    rows = [[1.0], [2.0], [0.5]]

    def loss(piece: Rows) -> LossOutput:
        found = piece.token_ids.max()
        return LossOutput(
            weight[0] * 0, "tokens", {"value_max": torch.where(found == rows[place][0], torch.nan, found)}
        )

    assert math.isnan(updater.run(Rows.of(*rows), loss).metrics["value_max"])


def test_c19_a_zero_gradient_moves_no_weight_though_adam_has_momentum():
    optim = Optim(lr=0.1, warmup_steps=0, optimizer={"_target_": "torch.optim.AdamW", "weight_decay": 0.1})
    updater, weight = make(optim)
    assert updater.run(Rows.of([1.0]), token_loss(weight)).stepped
    moved = weight.detach().clone()
    assert not updater.run(Rows.of([0.0]), token_loss(weight)).stepped
    assert not updater.run(Rows.of(), token_loss(weight)).stepped
    assert torch.equal(weight.detach(), moved)


def test_c19_a_gradient_that_is_not_finite_is_skipped_saved_and_stops_the_run_at_the_third(tmp_path: Path):
    said: list[str] = []
    updater, weight = make(Optim(lr=0.1), said=said, tmp=tmp_path)
    updater.run(Rows.of([1.0]), token_loss(weight))
    before = weight.detach().clone()
    for _ in range(2):
        assert not updater.run(Rows.of([float("nan")]), token_loss(weight)).stepped
    updater.run(Rows.of([0.5]), token_loss(weight))  # a good step in between starts the count again
    assert not torch.equal(weight.detach(), before) and torch.isfinite(weight).all()
    for _ in range(2):
        updater.run(Rows.of([float("inf")]), token_loss(weight))
    with pytest.raises(GuardTripped, match=r"optim\.lr"):
        updater.run(Rows.of([float("nan")]), token_loss(weight))
    assert len(list((tmp_path / "bad").glob("*.safetensors"))) == 5
    assert len(said) == 5


def test_g1_out_of_memory_redoes_the_step_with_the_same_gradient():
    batch = Rows.of([0.3, 0.1], [0.7], [1.1, -0.4, 0.2], [0.9])
    clean, expected = make(tokens=100)
    clean.run(batch, token_loss(expected))
    said: list[str] = []
    updater, weight = make(tokens=6, said=said)
    calls = []

    def loss(piece: Rows) -> LossOutput:
        calls.append(piece.token_ids.numel())
        if len(calls) == 2:  # after one micro-batch has left its gradient behind
            raise torch.OutOfMemoryError("injected")
        return token_loss(weight)(piece)

    updater.run(batch, loss)
    assert (weight - expected).abs().max() < 1e-10
    assert updater.tokens_per_micro_batch == 3 and calls[2:] == [3, 3, 1]
    assert "tokens_per_micro_batch=3" in said[0]


def test_g1_a_single_sequence_that_does_not_fit_is_one_clear_line():
    updater, _ = make(tokens=4)

    def loss(piece: Rows) -> LossOutput:
        raise torch.OutOfMemoryError("injected")

    with pytest.raises(OutOfMemory, match=r"grpo\.max_completion_tokens"):
        updater.run(Rows.of([1.0, 2.0], [3.0]), loss)


def test_the_learning_rate_warms_up_and_decays():
    linear = Optim(lr=1.0, warmup_steps=3, decay="linear")
    assert [learning_rate(linear, step, 11) for step in (0, 1, 2, 3, 7, 11)] == [0.25, 0.5, 0.75, 1.0, 0.5, 0.0]
    cosine = Optim(lr=2.0, warmup_steps=0, decay="cosine")
    assert [learning_rate(cosine, step, 4) for step in (0, 2, 4)] == pytest.approx([2.0, 1.0, 0.0])
    assert learning_rate(Optim(lr=0.5, warmup_steps=0), 10**6, 5) == 0.5


RANK_PROGRAM = """
import importlib.util, sys, torch
from dataclasses import replace
spec = importlib.util.spec_from_file_location("toy", sys.argv[1])
toy = importlib.util.module_from_spec(spec); sys.modules["toy"] = toy; spec.loader.exec_module(toy)
from reasoner import world
world.start()
batch = toy.Rows.of([0.3, 0.1], [0.7], [1.1, -0.4, 0.2])
mine = replace(batch, sequences=batch.sequences[:2] if world.rank() == 0 else batch.sequences[2:])
updater, weight = toy.make(tokens=2)
result = updater.run(mine, toy.token_loss(weight))
nothing = replace(batch, sequences=batch.sequences[:1] if world.rank() == 0 else ())
updater.run(nothing, toy.token_loss(weight))
print(weight.tolist(), result.metrics["value"], result.metrics["value_max"])
world.stop()
"""


def test_two_gloo_processes_give_the_gradient_of_one():
    outputs = on_two_ranks(RANK_PROGRAM, __file__)
    batch = Rows.of([0.3, 0.1], [0.7], [1.1, -0.4, 0.2])
    updater, weight = make()
    result = updater.run(batch, token_loss(weight))
    updater.run(replace(batch, sequences=batch.sequences[:1]), token_loss(weight))
    for output in outputs:
        values = [float(number) for number in output.replace("[", "").replace("]", "").replace(",", "").split()]
        assert values == pytest.approx([*weight.tolist(), result.metrics["value"], 1.1], abs=1e-10)
