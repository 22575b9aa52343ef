"""An adapter's matrices stepped as one vector: the same numbers, the same checkpoints, nothing left behind."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from reasoner import checkpoint
from reasoner.checkpoint import Progress
from reasoner.config import Optim
from reasoner.errors import RunFolderError
from reasoner.models import joined
from reasoner.models.joined import Stepped
from reasoner.optimizer_state import load_optimizer, optimizer_tensors
from reasoner.update import LossOutput, Updater
from tests.test_update import Rows

SHAPES = {"a": (4, 3), "norm": (5,), "b": (2, 6), "large": (5, 5), "c": (3, 1)}
ADAMW = {"_target_": "torch.optim.AdamW", "betas": [0.9, 0.99], "weight_decay": 0.1}


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joined, "LARGEST", 20)


def make_weights(scale: int = 1) -> dict[str, Parameter]:
    draws = torch.Generator().manual_seed(0)
    return {name: Parameter(torch.randn(*shape, generator=draws) * scale) for name, shape in SHAPES.items()}


def make_updater(weights: Mapping[str, Parameter], optimizer: dict = ADAMW, tokens: int = 1) -> Updater:
    optim = Optim(lr=0.05, warmup_steps=0, max_grad_norm=1e9, optimizer=optimizer)
    return Updater(
        weights, optim, num_steps=9, tokens_per_micro_batch=tokens, say=print, save_bad_batches_to=Path("nowhere")
    )


def loss_of(weights: Mapping[str, Parameter], without: str = ""):
    def loss(piece: Rows) -> LossOutput:
        x = piece.token_ids.float().sum()
        terms = [(one * x).sin().square().sum() for name, one in weights.items() if name != without]
        return LossOutput(torch.stack(terms).sum(), "tokens", {})

    return loss


BATCH = Rows.of([0.3, 0.1], [0.7], [1.1])


def gradients(weights: Mapping[str, Parameter]) -> None:
    for one in weights.values():
        one.grad = None
    for piece in BATCH.split(1):
        (loss_of(weights)(piece).sum / BATCH.counts.tokens).backward()


def test_a_vector_is_stepped_to_the_same_bits_as_its_matrices_alone():
    ours, alone = make_weights(), make_weights()
    updater = make_updater(ours)
    assert [one.numel() for one in updater.stepped.parameters] == [0, 5, 25]  # a, b, c; the norm; the large one
    optimizer = torch.optim.AdamW(alone.values(), lr=0.05, betas=(0.9, 0.99), weight_decay=0.1)
    for _ in range(4):
        gradients(alone)
        norm = torch.cat([one.grad.flatten() for one in alone.values() if one.grad is not None]).norm()
        optimizer.step()
        assert updater.run(BATCH, loss_of(ours)).grad_norm == pytest.approx(float(norm), rel=1e-6)
    for name, one in ours.items():
        assert torch.equal(one, alone[name]), name
        assert not torch.equal(one, make_weights()[name]), name


def test_the_step_is_clipped_over_all_weights_at_once():
    ours, alone = make_weights(), make_weights()
    updater = make_updater(ours, {"_target_": "torch.optim.Adam", "eps": 1.0})  # so that a gradient's size matters
    updater.optim = Optim(lr=0.05, warmup_steps=0, max_grad_norm=0.01, optimizer=updater.optim.optimizer)
    updater.run(BATCH, loss_of(ours))
    gradients(alone)
    torch.nn.utils.clip_grad_norm_(alone.values(), 0.01)
    torch.optim.Adam(alone.values(), lr=0.05, eps=1.0).step()
    for name, one in ours.items():
        torch.testing.assert_close(one, alone[name], rtol=1e-6, atol=1e-8)


def test_nothing_is_held_between_steps_and_every_write_is_counted():
    weights = make_weights()
    updater = make_updater(weights)
    places = {name: (one.data_ptr(), one._version) for name, one in weights.items()}
    updater.run(BATCH, loss_of(weights))
    assert updater.stepped.parameters[0].numel() == 0
    assert all(one.grad is None for one in (*weights.values(), *updater.stepped.parameters))
    for name, one in weights.items():
        place, version = places[name]
        assert one.data_ptr() == place and one._version > version, name


def test_a_member_without_a_gradient_has_zeros_and_a_step_without_any_is_none():
    weights = make_weights()
    updater = make_updater(weights, {"_target_": "torch.optim.Adam"})
    updater.run(BATCH, loss_of(weights, without="b"))
    before = make_weights()
    assert torch.equal(weights["b"], before["b"]) and not torch.equal(weights["a"], before["a"])
    assert not updater.run(Rows.of(), loss_of(weights)).stepped
    for everything, expected in ((False, []), (True, [27, 5, 25])):
        assert [one.numel() for one in updater.stepped.gather(everything=everything)] == expected
        updater.stepped.drop()


@pytest.mark.parametrize("target", ["torch.optim.Adafactor", "torch.optim.SGD", "torch.optim.Muon"])
def test_an_optimizer_that_is_not_known_to_go_number_by_number_has_each_weight(target: str):
    weights = list(make_weights().values())
    found = Stepped(weights, {"_target_": target}).parameters
    assert all(one is other for one, other in zip(found, weights, strict=True))


def test_dtypes_do_not_mix():
    weights = [Parameter(torch.zeros(2, 2, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16) * 2]
    vectors = Stepped(weights, ADAMW).parameters
    assert [one.dtype for one in vectors] == [torch.float32, torch.bfloat16]


def saved(tmp_path: Path, weights: Mapping[str, Parameter], updater: Updater) -> tuple[dict[str, Tensor], object]:
    tensors, state = optimizer_tensors(updater.optimizer)
    tensors |= {name: one.detach() for name, one in weights.items()}
    _, loaded, json_state = checkpoint.load(checkpoint.save(tmp_path, Progress(1, "sft", 3, 0, 0), tensors, state))
    return loaded, json_state


def test_three_steps_and_three_more_after_a_checkpoint_are_six(tmp_path: Path):
    unbroken = make_weights()
    whole = make_updater(unbroken)
    for _ in range(6):
        whole.run(BATCH, loss_of(unbroken))
    first = make_weights()
    updater = make_updater(first)
    for _ in range(3):
        updater.run(BATCH, loss_of(first))
    tensors, state = saved(tmp_path, first, updater)
    second = {name: Parameter(tensors[name]) for name in SHAPES}
    again = make_updater(second)
    load_optimizer(again.optimizer, tensors, state)
    for _ in range(3):
        again.run(BATCH, loss_of(second))
    for name, one in second.items():
        assert torch.equal(one, unbroken[name]), name


def test_a_checkpoint_of_matrices_that_were_stepped_alone_says_why_it_does_not_fit():
    alone = make_weights()
    optimizer = torch.optim.AdamW(alone.values(), lr=0.05)
    gradients(alone)
    optimizer.step()
    tensors, state = optimizer_tensors(optimizer)
    with pytest.raises(RunFolderError, match=r"\[5\] tensors by group, here \[3\].*stepped each matrix .* by itself"):
        load_optimizer(make_updater(make_weights()).optimizer, tensors, state)


def test_eight_bit_states_learn_what_float32_ones_do(monkeypatch: pytest.MonkeyPatch):
    """Matrices below bitsandbytes' 4096 numbers, whose states would have 32 bits if they were alone."""
    pytest.importorskip("bitsandbytes", reason="needs the extra gpu")
    monkeypatch.setattr(joined, "LARGEST", 10_000)
    draws = torch.Generator().manual_seed(1)
    goals = [torch.randn(30, 70, generator=draws), 0.01 * torch.randn(70, 30, generator=draws)]

    def distance(optimizer: dict) -> tuple[Updater, list[float]]:
        weights = {str(i): Parameter(torch.zeros_like(goal)) for i, goal in enumerate(goals)}
        updater = make_updater(weights, optimizer)
        updater.optim = Optim(lr=0.02, warmup_steps=0, max_grad_norm=1e9, optimizer=optimizer)

        def loss(piece: Rows) -> LossOutput:
            pairs = zip(weights.values(), goals, strict=True)
            return LossOutput(sum((w - goal).square().sum() for w, goal in pairs), "tokens", {})  # type: ignore[arg-type]

        for _ in range(60):
            updater.run(Rows.of([1.0]), loss)
        return updater, [
            float((w.detach() - g).norm() / g.norm()) for w, g in zip(weights.values(), goals, strict=True)
        ]

    updater, eight = distance({**ADAMW, "_target_": "bitsandbytes.optim.AdamW8bit", "weight_decay": 0.0})
    (state,) = updater.optimizer.state.values()
    assert state["state1"].dtype == torch.uint8 and state["state1"].numel() == 4200
    _, exact = distance({**ADAMW, "weight_decay": 0.0})
    for ours, theirs in zip(eight, exact, strict=True):
        assert ours < 1.5 * theirs + 0.05


def test_the_norm_is_that_of_the_matrices_also_where_there_are_millions_of_numbers(monkeypatch: pytest.MonkeyPatch):
    """One sum in float32 over the joined vector was 3e-5 too small on a CPU, enough to change where a run ends."""
    monkeypatch.setattr(joined, "LARGEST", 1 << 21)
    draws = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.zeros(128, 256)) for _ in range(64)]
    alone = torch.nn.Parameter(torch.zeros(7))
    for weight in (*weights, alone):
        weight.grad = torch.randn(weight.shape, generator=draws)
    exact = sum(weight.grad.double().square().sum() for weight in (*weights, alone)).sqrt()  # type: ignore[union-attr]
    stepped = Stepped([weights[0], alone, *weights[1:]], {"_target_": "torch.optim.AdamW"})
    (vector, _) = stepped.gather(everything=False)
    assert stepped.norm().item() == pytest.approx(exact.item(), rel=3e-6)
    assert torch.linalg.vector_norm(vector).item() != pytest.approx(exact.item(), rel=3e-6)  # what it must not be
