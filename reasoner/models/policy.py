"""The model being trained: log-probabilities of packed sequences, the weights that learn, and the frozen reference.

The base stays in eval mode for ever; `train_mode` wakes only what training needs (recomputation, adapter dropout). The
shift from "hidden state t predicts token t + 1" to "index t speaks of token t" happens in `Policy.logprobs` and nowhere
else. Left out: sampling (rollout/), optimizing (update.py) and an engine's copy of the adapter.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from reasoner.errors import ModelError
from reasoner.kernels import elementwise
from reasoner.kernels.linear_logprobs import Logprobs, linear_logprobs
from reasoner.models import adapters
from reasoner.models.adapted_linear import forget, join
from reasoner.models.attention import Layout
from reasoner.models.base_weights import BaseWeights
from reasoner.models.beside import save_beside
from reasoner.models.families import Family
from reasoner.models.fused import fuse
from reasoner.models.offload import Offloaded
from reasoner.models.sharing import Sharing
from reasoner.models.tiled import tile
from reasoner.models.weights import quiet

REFERENCE = "reference."


class Packed(Protocol):
    """What logprobs are asked of: N tokens of whole sequences side by side."""

    @property
    def token_ids(self) -> Tensor: ...  # int64 [N]

    @property
    def layout(self) -> Layout: ...

    @property
    def completion_mask(
        self,
    ) -> Tensor: ...  # bool [N], True: its logprob is wanted; False at every sequence's first token

    @property
    def targets(self) -> Tensor: ...  # int64 [M], where the mask is True; asking for them waits for no device


@dataclass(frozen=True, slots=True, eq=False)
class OneSequence:
    """`Packed`, of one sequence whose every token but the first is asked for."""

    token_ids: Tensor
    layout: Layout
    completion_mask: Tensor

    @property
    def targets(self) -> Tensor:
        """All but the first."""
        return torch.arange(1, len(self.token_ids), device=self.token_ids.device)


class Policy:
    """A causal language model that learns, whole or through its adapter. Made by `loading.load_model`, in eval mode."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        family: Family,
        *,
        revision: str | None,
        weights: BaseWeights | None = None,
    ):
        self.model = model
        self.family = family
        self.revision = revision  # the hub's commit, None for local files
        self.weights = weights  # the buffers that the base looks at; None: transformers' own, which can't be shared
        self._trainable: dict[str, Parameter] | None = None
        self._reference: dict[str, Tensor] | None = None
        if weights is not None:
            join(model, weights)
        if family.fused and self.device.type == "cuda":
            fuse(self.base, family.name)
        if family.known:
            tile(self.base)
        self.eval()

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model, adapter layers included where there are any."""
        return cast(PreTrainedModel, self.model.get_base_model()) if isinstance(self.model, PeftModel) else self.model

    @property
    def adapter_scaling(self) -> float:
        """What the adapter's B A is multiplied by."""
        assert isinstance(self.model, PeftModel), "this policy is trained whole"
        return adapters.scaling(self.model)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should be told of this model, one line each."""
        if self.family.packs:
            return self._notes_on_kernels()
        why = "is not in the table of families" if not self.family.known else "carries a state across a packed row"
        return (f"{self.family.name} {why}: its sequences run one a pass, which is slower", *self._notes_on_kernels())

    def _notes_on_kernels(self) -> tuple[str, ...]:
        if self.family.fused or self.device.type != "cuda" or not elementwise.preferred():
            return ()
        return (f"{self.family.name} has no kernels between its matmuls: that part runs in plain torch",)

    @property
    def shares_prompts(self) -> bool:
        """Whether a prefix that sequences share is computed once: where they can lie in one row."""
        return self.family.packs

    @property
    def device(self) -> torch.device:
        """Where the head is, and where batches must be."""
        return self.head_weight.device

    @property
    def head_weight(self) -> Tensor:
        """[V, D]; V may exceed the tokenizer's size, and the softmax goes over all of it."""
        return cast(torch.nn.Linear, self.base.get_output_embeddings()).weight

    def logprobs(self, batch: Packed, *, temperature: float) -> Logprobs:
        """log p(token t | its sequence before t), and the entropy there: [N], 0.0 where the mask is False.

        Of softmax(logits / temperature) over the head's whole vocabulary; float32 (float64 from a float64 model). Only
        the hidden rows before a masked token meet the head, so prompts cost no vocabulary matmul, and a prefix that the
        layout says sequences share is computed once. Differentiable unless torch.no_grad is on.
        """
        targets = batch.targets
        sharing = batch.layout.sharing() if self.shares_prompts else None
        try:
            hidden = self._hidden(batch.token_ids, batch.layout, sharing)
        finally:
            forget()
        before = targets - 1  # of a completion's first token this is the prompt's last, whoever computed it
        found = linear_logprobs(
            hidden.index_select(0, before) if sharing is None else sharing.take(hidden, before),
            self.head_weight,
            batch.token_ids[targets],
            temperature=temperature,
            soft_cap=self.family.soft_cap,
            logit_scale=self.family.logit_scale,
        )
        zeros = found.logprobs.new_zeros(batch.token_ids.shape)
        return Logprobs(zeros.index_copy(0, targets, found.logprobs), zeros.index_copy(0, targets, found.entropy))

    @torch.no_grad()
    def score(self, token_ids: Sequence[int]) -> Tensor:
        """log p(token | those before it) of every token of one sequence but the first, at temperature 1: [T - 1]."""
        ids = torch.tensor(token_ids, device=self.device)
        layout = Layout.of([len(ids)], self.device)
        return self.logprobs(OneSequence(ids, layout, layout.positions > 0), temperature=1.0).logprobs[1:]

    def _hidden(self, token_ids: Tensor, layout: Layout, sharing: Sharing | None = None) -> Tensor:
        """The last hidden states [N, D], each of its own sequence alone; with `sharing` [R, D], of what it computes."""
        backbone = getattr(self.base, self.base.base_model_prefix)
        if not self.family.packs:
            rows = [
                backbone(input_ids=ids[None], use_cache=False).last_hidden_state[0]
                for ids in token_ids.split(layout.lengths)
            ]
            return torch.cat(rows)
        positions, asking, told = layout.positions, layout, {}
        if sharing is not None:
            token_ids, positions = token_ids[sharing.own], positions[sharing.own]
            asking, told = sharing, {"sharing": sharing}
        return backbone(
            input_ids=token_ids[None],
            position_ids=positions[None],
            use_cache=False,
            cu_seq_lens_q=asking.cu_seqlens,
            cu_seq_lens_k=layout.cu_seqlens,
            max_length_q=asking.max_seqlen,
            max_length_k=layout.max_seqlen,
            **told,
        ).last_hidden_state.squeeze(0)

    @property
    def recomputed(self) -> int:
        """How many layers keep their inputs alone and run again in the backward."""
        return len(self._recomputing())

    @property
    def offloads(self) -> bool:
        """Whether those inputs are kept on the host."""
        functions = (getattr(layer, "_gradient_checkpointing_func", None) for layer in self._recomputing())
        return any(isinstance(function, Offloaded) for function in functions)

    def _recomputing(self) -> list[torch.nn.Module]:
        return [part for part in self.model.modules() if _recomputes(part)]

    def train_mode(self, *, dropout: bool) -> None:
        """Ready for a backward: layers recompute if loaded so, and the adapter drops inputs if `dropout` (SFT only)."""
        self.model.eval()
        for part in [*self._recomputing(), *(adapters.dropouts(self.model) if dropout else [])]:
            part.training = True  # not .train(): that would wake the base's own dropout below it

    def eval(self) -> None:
        """Ready for logprobs and sampling: nothing is dropped, and the same batch gives the same bits."""
        self.model.eval()

    def trainable(self) -> dict[str, Parameter]:
        """The weights that learn, by name; a tied one once. They stay the same objects: walking the modules takes
        milliseconds, so it is done once."""
        if self._trainable is None:
            self._trainable = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        return dict(self._trainable)

    @property
    def has_reference(self) -> bool:
        """Whether freeze_reference was called, in this run or before the checkpoint it goes on from."""
        return self._reference is not None

    def freeze_reference(self) -> None:
        """Keep a float32 copy of the weights that learn, as they are now; an earlier one is replaced."""
        self._reference = {
            name: weight.detach().to(_at_least_float32(weight), copy=True) for name, weight in self.trainable().items()
        }

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the policy is what it was at freeze_reference, without gradients; the weights then come back."""
        assert self._reference is not None, "freeze_reference comes first"
        weights, frozen = self.trainable(), self._reference
        current = {name: weight.data for name, weight in weights.items()}
        try:
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.data = frozen[name]
                yield
        finally:
            for name, weight in weights.items():
                weight.data = current[name]

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint needs: the weights that learn, and `reference.NAME` once frozen. These are no copies."""
        frozen = {REFERENCE + name: tensor for name, tensor in (self._reference or {}).items()}
        return {name: weight.detach() for name, weight in self.trainable().items()} | frozen

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave. Raises ModelError, with nothing changed, if a name or shape differs."""
        weights = self.trainable()
        frozen = {name.removeprefix(REFERENCE): tensor for name, tensor in state.items() if name.startswith(REFERENCE)}
        own = {name: tensor for name, tensor in state.items() if not name.startswith(REFERENCE)}
        for saved in (own, frozen) if frozen else (own,):
            _check_names_and_shapes(saved, weights)
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(own[name])
        self._reference = {
            name: tensor.to(weights[name].device, _at_least_float32(weights[name]), copy=True)
            for name, tensor in frozen.items()
        } or None

    def save(self, folder: Path, tokenizer: PreTrainedTokenizerBase, *, stop_ids: tuple[int, ...] = ()) -> None:
        """The adapter in PEFT's layout, or the model as a transformers folder; tokenizer and stop ids with it.

        Safetensors and JSON only. `stop_ids` become generation_config's eos_token_id, so that others stop where we do.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.model, PeftModel):
            adapters.save(self.model, folder)
        else:
            with quiet():
                self.model.save_pretrained(folder)
        save_beside(folder, tokenizer, stop_ids)

    def reload(self, folder: Path) -> None:
        """Take the adapter's weights back from the files that `save` wrote. Raises ModelError if they are another's."""
        assert isinstance(self.model, PeftModel), "a whole model is read by loading.load_saved"
        adapters.reload(self.model, folder)


def _recomputes(part: torch.nn.Module) -> bool:
    return isinstance(part, GradientCheckpointingLayer) and part.gradient_checkpointing


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _check_names_and_shapes(saved: Mapping[str, Tensor], weights: Mapping[str, Parameter]) -> None:
    odd = sorted(saved.keys() ^ weights.keys())
    odd += [name for name in saved.keys() & weights.keys() if saved[name].shape != weights[name].shape]
    if odd:
        raise ModelError(
            f"the saved weights are not of this model: {len(odd)} differ in name or shape, first {odd[0]}. "
            "Give the model.* settings of the run that saved them"
        )
