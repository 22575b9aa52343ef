# pyright: reportMissingImports=false
# (vLLM is there only on GPU machines.)
"""Tokens of vLLM's sequences without vLLM's host between them: two CUDA graphs a token, one launch each.

vLLM's runner prepares, samples and keeps books in Python for every token, 2 to 3 ms that a small model's card waits
for. Within a burst (vllm_bursts.py) a sequence only moves on by the token that was drawn, which the card can do alone
(vllm_decode_triton.py). vLLM's own functions prepare the first token of a burst; its captured forward pass makes each
token's hidden states; a second graph, captured here by batch size, does the rest. Where the runner is not what this was
written for there is no `DecodeGraphs`, and bursts go by the runner's own steps. Left out: prompts, top-k and penalties.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy
import torch
from torch import Tensor

from reasoner.rollout import vllm_decode_triton as card
from reasoner.rollout.vllm_bursts import Drawn
from reasoner.rollout.vllm_weights import PlainState, Scores

ON_CARD = {"FLASH_ATTN", "TRITON_ATTN"}  # vLLM's attention whose preparation is kernels alone, so that a graph holds it


def decode_graphs(worker: Any, scores: Scores, most: int) -> "DecodeGraphs | None":
    """Graphs for bursts of `most` tokens on this worker of vLLM; None where its runner does more for a token than they
    would (the older runner, speculation, LoRA slots, models of pictures, which read embeddings and no ids, graphs
    switched off), and where its attention asks the host about each token (FlashInfer, vLLM's choice on a B200)."""
    if not worker.use_v2_model_runner:
        return None
    from vllm.config.compilation import CUDAGraphMode
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    runner = worker.model_runner
    plain = type(runner.model_state) in (DefaultModelState, PlainState) and runner.model_state.rope_state is None
    captured = CUDAGraphMode.FULL in runner.cudagraph_manager._capture_descs
    on_card = {group.backend.get_name() for groups in runner.attn_groups for group in groups} <= ON_CARD
    more = runner.speculator is not None or runner.lora_config is not None or runner.supports_mm_inputs
    if not (plain and captured and on_card) or more:
        return None
    return DecodeGraphs(runner, scores, most)


class DecodeGraphs:
    """A model runner's graphs for what follows its forward pass, by batch size, each captured when it is first used."""

    def __init__(self, runner: Any, scores: Scores, most: int):
        self.runner, self.scores = runner, scores
        self.rows = card.Rows.empty(runner.max_num_reqs, most, runner.device)
        self.host = torch.zeros_like(self.rows.drawn, device="cpu", pin_memory=True)
        self._tiles: card.Tiles | None = None
        self._captured: dict[Any, torch.cuda.CUDAGraph] = {}
        self._side = torch.cuda.Stream(runner.device)
        self._batch: Any = None  # what vLLM calls the shape of the burst under way
        self._sequences = 0

    @torch.inference_mode()
    def begin(self, plan: Any) -> bool:
        """Make ready what the scheduler planned: a burst of one token after another of these sequences, all of which
        have one to begin with. False, with nothing done, where there is no graph for so many."""
        runner, names = self.runner, list(plan.num_scheduled_tokens)
        size = len(names)
        shape = runner.cudagraph_manager.dispatch(size, size, 1, 0)
        if shape not in runner.cudagraph_manager.graphs:
            return False
        if shape not in self._captured:
            self._captured[shape] = self._capture(shape)
        # A plan without tokens has the runner take note of who came, went and got blocks, and do nothing else.
        runner.execute_model(replace(plan, num_scheduled_tokens={}, total_num_scheduled_tokens=0))
        batch = runner.prepare_inputs(plan, shape)
        assert batch.req_ids == names and not batch.is_prefilling_np.any()
        self._prepare_attention(batch, *runner.prepare_attn(batch))
        sampling, rows = runner.sampler.sampling_states, self.rows
        rows.slots.fill_(-1)
        rows.steps.zero_()
        rows.slots[:size] = batch.idx_mapping
        rows.temperatures[:size] = sampling.temperature.gpu[batch.idx_mapping]
        rows.seeds[:size] = sampling.seeds.gpu[batch.idx_mapping]
        self._batch, self._sequences = shape, size
        return True

    @torch.inference_mode()
    def launch(self, first: int, count: int) -> Callable[[], list[Drawn]]:
        """Have tokens `first` to `first + count` of the burst drawn; what is returned waits for them."""
        assert first + count <= len(self.rows.drawn)
        manager, graph = self.runner.cudagraph_manager, self._captured[self._batch]
        for _ in range(count):
            manager.run_fullgraph(self._batch)
            graph.replay()
        steps = slice(first, first + count)
        self.host[steps].copy_(self.rows.drawn[steps], non_blocking=True)
        done = torch.cuda.Event()
        done.record()

        def wait() -> list[Drawn]:
            done.synchronize()
            found = self.host[steps, :, : self._sequences].numpy().copy()
            return [Drawn(one[0].astype(numpy.int64), one[1].view(numpy.float32)) for one in found]

        return wait

    def _capture(self, shape: Any) -> torch.cuda.CUDAGraph:
        """The graph of what follows the forward pass for batches of this shape."""
        from vllm.v1.worker.gpu.input_batch import InputBatch

        runner = self.runner
        batch = InputBatch.make_dummy(shape.num_reqs, shape.num_tokens, runner.input_buffers)
        tables = runner.block_tables.get_dummy_block_tables(shape.num_reqs)
        places = runner.block_tables.get_dummy_slot_mappings(shape.num_tokens)
        self.rows.slots.fill_(-1)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        # Not `with torch.cuda.graph(...)`, which collects garbage: half a second.
        self._side.wait_stream(torch.cuda.current_stream())
        self.scores.in_use = True
        try:
            with torch.cuda.stream(self._side):
                self._after_forward(batch, tables, places)  # compiles its kernels; without sequences it changes nothing
                torch.cuda.synchronize()
                graph.capture_begin(pool=runner.cudagraph_manager.pool, capture_error_mode="thread_local")
                try:
                    self._after_forward(batch, tables, places)
                except BaseException:
                    with suppress(RuntimeError):  # the capture is void, and its own error would hide this one
                        graph.capture_end()
                    raise
                graph.capture_end()
        finally:
            self.scores.in_use = False
        torch.cuda.current_stream().wait_stream(self._side)
        return graph

    def _after_forward(self, batch: Any, tables: Sequence[Tensor], places: Tensor) -> None:
        """From hidden states to a token a row, and everything the next forward pass reads."""
        runner, rows, size = self.runner, self.rows, batch.num_reqs
        states, buffers = runner.req_states, runner.input_buffers
        scores = runner.model.compute_logits(runner.cudagraph_manager.hidden_states[:size])
        if self._tiles is None:
            self._tiles = card.Tiles.empty(runner.max_num_reqs, scores.shape[1], scores.device)
        card.pick(scores, buffers.positions, rows, self._tiles)
        card.take(
            self._tiles, rows, size, scores.shape[1], states.last_sampled_tokens, states.num_computed_tokens.gpu,
            buffers.input_ids, buffers.positions, buffers.seq_lens,
        )  # fmt: skip
        sizes = runner.block_tables.kernel_block_sizes
        for table, block_size, out in zip(tables, sizes, places, strict=True):
            card.place(rows.slots[:size], buffers.positions, table, block_size, out)
        self._prepare_attention(batch, tables, places)

    def _prepare_attention(self, batch: Any, tables: Any, places: Tensor) -> None:
        """What the attention kernels of the next forward pass read, for the longest context there may be: the graph of
        that pass was captured so."""
        from vllm.config.compilation import CUDAGraphMode

        runner = self.runner
        longest = torch.full((batch.num_reqs_after_padding,), runner.max_model_len, dtype=torch.int32)
        runner.model_state.prepare_attn(
            replace(batch, seq_lens_cpu_upper_bound=longest),
            CUDAGraphMode.FULL,
            tables,
            places,
            runner.attn_groups,
            runner.kv_cache_config,
        )
