"""Which tokens a model never learned: a stop or turn token among them is never sampled, and LoRA does not teach it.

Untrained rows keep the one vector they began with (258 of 512 in the stories260K checkpoint, `</s>` among them), so
they lie together. Their norm tells nothing: there it is larger than that of living rows. Left out: what to do about it
(use a plain template with a trained stop).
"""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import normalize

from reasoner.models.policy import Policy

SAME = 0.99  # cosine of two rows after the mean row is taken off
CROWD = 8  # so many other rows in the same place are no accident


def untrained_tokens(policy: Policy, ids: Iterable[int]) -> list[int]:
    """Those of `ids` whose embedding or head row lies in a crowd of equal rows, in the order given."""
    asked = list(dict.fromkeys(ids))
    embedding = cast(Tensor, policy.base.get_input_embeddings().weight)
    tables = [embedding] if embedding is policy.head_weight else [embedding, policy.head_weight]
    crowded = torch.stack([_crowded(table.detach(), asked) for table in tables]).any(0)
    return [token for token, hit in zip(asked, crowded.tolist(), strict=True) if hit]


def _crowded(table: Tensor, ids: list[int]) -> Tensor:
    mean = table.mean(0, dtype=torch.float32)
    asked = normalize(table[ids].float() - mean, dim=1)
    near = torch.zeros(len(ids), device=table.device)
    for rows in table.split(16_384):  # a copy in float32 of a piece, not of 150,000 rows
        near += (asked @ normalize(rows.float() - mean, dim=1).T > SAME).sum(1)
    return near - 1 >= CROWD
