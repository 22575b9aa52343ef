"""llama.cpp through llama-cpp-python: quantizes GGUF files, and answers from one as its users' programs do.

Its C interface is called as it is: the package's own `Llama` keeps the logits of a whole context (1 GiB for 2,048
tokens of a vocabulary of 128,000). Weights and cache have llama.cpp's own settings, so that what is measured is what
others get. Left out: sampling (greedy alone is asked for) and GPUs.
"""

import ctypes
import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reasoner.errors import MissingExtra, ModelError
from reasoner.rollout.engine import Capabilities, Decode, Finished, Sampling, check_prompts, completed, unheard
from reasoner.types import Completion, Prompt

PACKAGE = "llama_cpp"
SEQUENCES = 8  # answered side by side
CHUNK = 128  # tokens whose logits are held at once
FTYPE_Q4_K_M = 15  # LLAMA_FTYPE_MOSTLY_Q4_K_M
ERROR = 3  # GGML_LOG_LEVEL_ERROR


class Library:
    """The C interface, and what it said at level error; all else that it logs is dropped."""

    def __init__(self, llama: Any):
        self.llama = llama
        self._said: list[str] = []
        self._hear = llama.llama_log_callback(self._keep)  # kept, for C holds no reference
        llama.llama_log_set(self._hear, ctypes.c_void_p(0))

    def _keep(self, level: int, text: bytes, _: Any) -> None:
        if level == ERROR:
            self._said.append(text.decode(errors="replace").strip())

    def said(self) -> str:
        """What was said since the last call, one line."""
        words = " ".join(self._said) or "it gives no reason"
        self._said.clear()
        return words


def installed() -> bool:
    """Whether llama-cpp-python is there; it is not imported."""
    return importlib.util.find_spec(PACKAGE) is not None


def require(purpose: str) -> None:
    """Raises MissingExtra where llama-cpp-python is not installed."""
    if not installed():
        raise MissingExtra("llama-cpp-python", "export", purpose)


def quantize(source: Path, target: Path, *, threads: int) -> None:
    """The f16 file as Q4_K_M; tensors whose rows don't divide into blocks of 256 get what llama.cpp takes instead.

    Raises ModelError with llama.cpp's own words.
    """
    library = _library()
    settings = library.llama.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = FTYPE_Q4_K_M, threads
    if library.llama.llama_model_quantize(_path(source), _path(target), ctypes.byref(settings)):
        raise ModelError(f"llama.cpp could not quantize {source}: {library.said()}")


class LlamaEngine:
    """An `Engine` over a GGUF file, greedy. To be closed."""

    capabilities = Capabilities(name="llama.cpp", own_weights=True, images=False)

    def __init__(self, path: Path, decode: Decode, *, max_context: int, threads: int):
        """`max_context`: tokens of prompt and completion together. Raises ModelError if llama.cpp can't load it."""
        self.decode, self.max_context = decode, max_context
        self._library, llama = _library(), _library().llama
        settings = llama.llama_model_default_params()
        settings.n_gpu_layers = 0
        self._model = llama.llama_model_load_from_file(_path(path), settings)
        if not self._model:
            raise ModelError(f"llama.cpp can't load {path}: {self._library.said()}")
        options = llama.llama_context_default_params()
        options.n_ctx, options.n_seq_max = max_context * SEQUENCES, SEQUENCES
        options.n_batch = max(max_context, SEQUENCES, CHUNK)
        options.n_threads = options.n_threads_batch = threads
        self._context = llama.llama_init_from_model(self._model, options)
        if not self._context:
            llama.llama_model_free(self._model)
            raise ModelError(f"llama.cpp can't run {path}: {self._library.said()}")
        self._vocabulary = llama.llama_model_get_vocab(self._model)
        self._size = llama.llama_vocab_n_tokens(self._vocabulary)
        self._batch = llama.llama_batch_init(options.n_batch, 0, 1)

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, policy_step: int, finished: Finished = unheard
    ) -> list[list[Completion]]:
        """See `Engine.generate`; temperature 0 and one completion alone."""
        assert sampling.temperature == 0 and sampling.num_completions == 1, sampling
        check_prompts(prompts, sampling, self.max_context, self.capabilities)
        found: list[list[Completion]] = []
        for start in range(0, len(prompts), SEQUENCES):
            some = prompts[start : start + SEQUENCES]
            for i, (ids, logprobs) in enumerate(self._greedy(some, sampling), start):
                stopped = ids[-1] in sampling.stop_ids
                one = completed(ids, logprobs, stopped=stopped, decode=self.decode, policy_step=policy_step)
                found.append([one])
                finished(i, 0, one)
        return found

    def score(self, token_ids: Sequence[int]) -> Tensor:
        """log p(token | those before it) of every token of one sequence but the first: float32 [T - 1]."""
        assert len(token_ids) <= self.max_context, f"{len(token_ids)} tokens in a context of {self.max_context}"
        self._forget()
        found, targets = [], torch.tensor(token_ids[1:])
        for start in range(0, len(token_ids) - 1, CHUNK):
            piece = token_ids[start : start + CHUNK][: len(token_ids) - 1 - start]
            logits = self._decode([(token, start + i, 0, True) for i, token in enumerate(piece)])
            wanted = targets[start : start + len(piece), None]
            found.append(logits.log_softmax(-1).gather(1, wanted)[:, 0])
        return torch.cat(found)

    def tokenize(self, text: str) -> list[int]:
        """The ids of a text as llama.cpp cuts it, control tokens and its own BOS included."""
        data = text.encode()
        room = len(data) + 8
        ids = (ctypes.c_int32 * room)()
        count = self._library.llama.llama_tokenize(self._vocabulary, data, len(data), ids, room, True, True)
        assert 0 <= count <= room, f"{count} tokens of {len(data)} bytes"
        return list(ids[:count])

    def ends(self, token_id: int) -> bool:
        """Whether llama.cpp stops at this token by itself."""
        return bool(self._library.llama.llama_vocab_is_eog(self._vocabulary, token_id))

    @property
    def chat_template(self) -> str | None:
        """The Jinja template that the file carries."""
        found = self._library.llama.llama_model_chat_template(self._model, None)
        return found.decode() if found else None

    def _greedy(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[tuple[list[int], list[float]]]:
        self._forget()
        rows: list[tuple[list[int], list[float]]] = [([], []) for _ in prompts]
        last = []
        for row, prompt in enumerate(prompts):
            ids = prompt.token_ids
            last.append(self._decode([(t, i, row, i + 1 == len(ids)) for i, t in enumerate(ids)])[0])
        going, logits = list(range(len(prompts))), torch.stack(last)
        while True:
            picked = logits.argmax(-1)
            chances = logits.log_softmax(-1).gather(1, picked[:, None])[:, 0]
            for row, token, logprob in zip(going, picked.tolist(), chances.tolist(), strict=True):
                rows[row][0].append(token)
                rows[row][1].append(logprob)
            going = [
                row
                for row in going
                if rows[row][0][-1] not in sampling.stop_ids and len(rows[row][0]) < sampling.max_tokens
            ]
            if not going:
                return rows
            width = {row: len(prompts[row].token_ids) + len(rows[row][0]) - 1 for row in going}
            logits = self._decode([(rows[row][0][-1], width[row], row, True) for row in going])

    def _decode(self, tokens: Sequence[tuple[int, int, int, bool]]) -> Tensor:
        """Logits float32 [those asked for, V] of (token, position, sequence, whether its logits are wanted)."""
        batch, wanted = self._batch, sum(asked for *_, asked in tokens)
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, asked) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, asked
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        failed = self._library.llama.llama_decode(self._context, batch)
        if failed:
            raise ModelError(f"llama.cpp could not compute (code {failed}): {self._library.said()}")
        rows = np.ctypeslib.as_array(self._library.llama.llama_get_logits(self._context), shape=(wanted, self._size))
        return torch.from_numpy(rows.copy())

    def _forget(self) -> None:
        llama = self._library.llama
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)

    def load_adapter(self, state: Mapping[str, Tensor], policy_step: int) -> None:
        """Not there: a file's weights stay as they are."""
        raise NotImplementedError("a GGUF file takes no adapter")

    def sleep(self) -> None:
        """Nothing to free that a trainer would want."""

    def wake(self) -> None:
        """Nothing to do, as in `sleep`."""

    def close(self) -> None:
        """Give the file's memory back."""
        llama = self._library.llama
        llama.llama_batch_free(self._batch)
        llama.llama_free(self._context)
        llama.llama_model_free(self._model)


def _path(path: Path) -> bytes:
    return str(path).encode()


@lru_cache(maxsize=1)
def _library() -> "Library":
    try:
        return Library(importlib.import_module(PACKAGE))
    except (ImportError, OSError, RuntimeError) as error:
        raise ModelError(f"llama-cpp-python is installed and can't be loaded: {error}; install it again") from None
