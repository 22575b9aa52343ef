"""MLPs in tiles of rows: the numbers and gradients of the whole, and not one run of the MLP more than that needs."""

from typing import Any

import pytest
import torch

from reasoner.config import Lora
from reasoner.models import adapters, tiled
from reasoner.models.families import family_of
from reasoner.models.loading import recompute_layers
from reasoner.models.policy import Policy
from tests.models.tiny_models import fill_b, gradients, lora_of, make_batch, make_model, make_policy

BATCH = make_batch((30, 21))  # 51 rows: tiles of 8, the last of 3


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, 50, 8)


def cut(monkeypatch: pytest.MonkeyPatch, most: int, size: int) -> None:
    """Rows at once and rows of a tile, however narrow they are."""
    monkeypatch.setattr(tiled, "MOST_ROWS", most)
    monkeypatch.setattr(tiled, "TILE_ROWS", size)
    monkeypatch.setattr(tiled, "WIDE_ROW", 1)


def learn(policy: Policy, **how: Any) -> dict[str, torch.Tensor]:
    policy.train_mode(dropout=how.get("dropout", False))
    found = policy.logprobs(BATCH, temperature=1.0)
    weights = torch.linspace(-1, 1, len(BATCH.token_ids), dtype=found.logprobs.dtype)
    return {"logprobs": found.logprobs.detach(), **gradients(policy, (found.logprobs * weights).sum())}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("family", "lora"),
    [
        ("llama", lora_of("llama")),
        ("llama", None),
        ("llama", Lora(r=4, alpha=8, targets=["gate_proj", "up_proj", "down_proj"])),  # nothing before the first MLP
        ("phi3", lora_of("phi3")),
        ("gemma3_text", lora_of("gemma3_text")),
    ],
)
def test_gradients_are_those_of_the_whole(
    family: str, lora: Lora | None, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy(family, lora=lora, dtype=torch.float64)
    assert sum(isinstance(part, tiled.Tiled) for part in policy.model.modules()) == 2
    if recompute:
        recompute_layers(policy.base, "tiny")
    whole = learn(policy)
    cut(monkeypatch, 50, 8)
    found = learn(policy)
    for name, truth in whole.items():
        torch.testing.assert_close(found[name], truth, atol=1e-10, rtol=1e-10)
    with torch.no_grad():
        looked = policy.logprobs(BATCH, temperature=1.0).logprobs
    torch.testing.assert_close(looked, whole["logprobs"], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("recompute", "runs"), [(False, 2), (True, 2)])
@pytest.mark.usefixtures("small_tiles")
def test_each_tile_runs_once_forward_and_once_for_its_backward(recompute: bool, runs: int) -> None:
    policy = make_policy("llama", lora=lora_of("llama"))
    if recompute:
        recompute_layers(policy.base, "tiny")
    rows: list[int] = []
    for layer in policy.base.model.layers:
        layer.mlp.down_proj.register_forward_hook(lambda _, args, __: rows.append(args[0].shape[1]))
    learn(policy)
    assert rows == [8, 8, 8, 8, 8, 8, 3] * runs * len(policy.base.model.layers)


@pytest.mark.usefixtures("small_tiles")
def test_where_something_is_dropped_it_is_computed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy("llama", lora=lora_of("llama", dropout=0.5))
    seen: list[int] = []
    each = tiled._each
    monkeypatch.setattr(tiled, "_each", lambda run, x, size: seen.append(x.shape[1]) or each(run, x, size))
    learn(policy, dropout=True)
    assert seen == []
    learn(policy)
    assert seen == [51, 51]


@pytest.mark.parametrize(
    ("width", "rows", "dtype", "tiles"),
    [
        (14_336, 16_384, torch.bfloat16, [16_384]),  # an 8B Llama
        (14_336, 20_000, torch.bfloat16, [8192, 8192, 3616]),
        (18_944, 16_384, torch.bfloat16, [16_384]),  # Qwen2.5-7B: wider, and not cut earlier
        (14_336, 16_385, torch.float32, [8192, 8192, 1]),
        (8960, 26_214, torch.bfloat16, [26_214]),  # Qwen2.5-1.5B: 28,672 / 17,920 of the rows
        (8960, 26_215, torch.bfloat16, [13_107, 13_107, 1]),
        (1536, 65_536, torch.bfloat16, [65_536]),  # SmolLM2-135M
    ],
)
@torch.no_grad()
def test_a_batch_is_cut_by_the_bytes_of_its_widest_rows(
    width: int, rows: int, dtype: torch.dtype, tiles: list[int]
) -> None:
    class WideMLP(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down_proj = torch.nn.Linear(width, 1, device="meta")  # of which nothing but its width is asked

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x.shape[1])
            return x

    seen: list[int] = []
    mlp = WideMLP()
    assert tiled.tile(mlp) == 1
    x = torch.arange(rows, dtype=dtype)[None, :, None]
    assert torch.equal(mlp(x), x) and seen == tiles


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_card_a_long_batch_takes_half_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from reasoner.models.attention import Layout
    from tests.models.tiny_models import Batch

    sizes = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 4096, "max_position_embeddings": 32_768}
    base = make_model("llama", **sizes).to("cuda", torch.bfloat16).requires_grad_(False)
    model = adapters.attach(base, lora_of("llama"), name="tiny", revision=None)
    fill_b(model)
    policy = Policy(model, family_of(base.config), revision=None)  # on the card from the first: kernels, then tiles
    recompute_layers(policy.base, "tiny")
    policy.train_mode(dropout=False)
    lengths = (16_384, 16_000)
    one = make_batch(lengths)
    batch = Batch(one.token_ids.cuda(), Layout.of(lengths, "cuda"), one.completion_mask.cuda())
    peaks, found = [], []
    for most in (1 << 20, tiled.MOST_ROWS):
        cut(monkeypatch, most, tiled.TILE_ROWS)
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            gradient = gradients(policy, policy.logprobs(batch, temperature=1.0).logprobs.sum())
            peak = torch.cuda.max_memory_allocated() - before
        peaks.append(peak)
        found.append(torch.cat([one.float().flatten() for one in gradient.values()]))
    assert peaks[1] < peaks[0] / 2
    assert (found[1] - found[0]).norm() < 0.02 * found[0].norm()
