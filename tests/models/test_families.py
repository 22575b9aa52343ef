"""The table of families against transformers' configs, and H5: an unknown scaling of logits is refused."""

import pytest
import torch
from transformers import AutoConfig

from reasoner.errors import ModelError
from reasoner.models import tiled
from reasoner.models.families import FAMILIES, family_of
from tests.models import tiny_models


@pytest.mark.parametrize(
    ("family", "soft_cap", "scale"),
    [
        ("llama", None, 1.0),
        ("gemma2", 0.5, 1.0),
        ("cohere", None, 0.25),
        ("cohere2", None, 0.25),
        ("granite", None, 0.5),
    ],
)
def test_h5_soft_cap_and_scale_come_from_the_config(family: str, soft_cap: float | None, scale: float) -> None:
    found = family_of(tiny_models.make_config(family))
    assert (found.name, found.packs, found.soft_cap, found.logit_scale) == (family, True, soft_cap, scale)


def test_every_packing_row_is_compared_with_transformers() -> None:
    assert {name for name, row in FAMILIES.items() if row.packs} == set(tiny_models.FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_takes_the_family_s_own_defaults(family: str) -> None:
    assert family_of(AutoConfig.for_model(family)).known


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"logit_scale": 0.5}),
        ("recurrent_gemma", {}),  # logits_soft_cap
        ("falcon_h1", {"lm_head_multiplier": 0.3}),
        ("minicpm3", {}),  # dim_model_base
        ("granitemoe", {"logits_scaling": 8.0}),
        ("nanochat", {}),  # final_logit_softcapping
        ("qwen2", {"output_multiplier": 0.2}),
    ],
)
def test_h5_an_unknown_key_that_scales_logits_is_refused(family: str, settings: dict[str, float]) -> None:
    with pytest.raises(ModelError, match="scale its logits"):
        family_of(AutoConfig.for_model(family, **settings))


@pytest.mark.parametrize("family", ["gpt2", "falcon_h1", "olmo3", "glm4", "mixtral", "starcoder2"])
def test_an_unknown_family_that_scales_nothing_runs_one_sequence_a_pass(family: str) -> None:
    found = family_of(AutoConfig.for_model(family))
    assert not found.known and not found.packs and (found.soft_cap, found.logit_scale) == (None, 1.0)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_a_batch_that_goes_through_mlps_in_tiles_is_scored_as_a_whole(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gpt-oss's experts are in a block that is named an MLP and gives more than rows."""
    policy, batch = tiny_models.make_policy(family), tiny_models.make_batch((30, 21))
    whole = policy.logprobs(batch, temperature=1.0).logprobs
    monkeypatch.setattr(tiled, "MOST_ROWS", 4)
    monkeypatch.setattr(tiled, "TILE_ROWS", 3)
    monkeypatch.setattr(tiled, "WIDE_ROW", 1)
    torch.testing.assert_close(policy.logprobs(batch, temperature=1.0).logprobs, whole, atol=1e-4, rtol=1e-4)
