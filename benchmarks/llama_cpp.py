"""llama.cpp's prebuilt libraries behind cffi: as much of them as decoding and quantising take.

The libraries come without headers. The structures below are those of NPM_VERSION's release, and a library whose default
values lie elsewhere is refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from cffi import FFI

NPM_PACKAGE, NPM_VERSION = "@node-llama-cpp/linux-x64", "3.22.1"
LIBRARIES = Path("node_modules") / NPM_PACKAGE / "bins" / "linux-x64"

DECLARATIONS = """
typedef struct { void *devices, *buffer_types; int32_t gpu_layers; int32_t split_mode, load_mode, lazy_mode, main_gpu;
    void *tensor_split, *progress, *progress_data, *overrides;
    bool vocab_only, check_tensors, use_extra_buffers, no_host, no_alloc, load_mtp; } model_params;
typedef struct { uint32_t n_ctx, n_batch, n_ubatch, n_seq_max, n_rs_seq, n_outputs_max, n_outputs_max_per_seq;
    int32_t n_threads, n_threads_batch; int32_t context_type, rope_scaling, pooling, attention, flash_attention;
    float rope_base, rope_scale, yarn_ext, yarn_attn, yarn_fast, yarn_slow; uint32_t yarn_context; float defrag;
    void *eval, *eval_data; int32_t type_k, type_v; void *abort, *abort_data;
    bool embeddings, offload_kqv, no_perf, op_offload, swa_full, kv_unified;
    void *samplers; size_t num_samplers; void *other; } context_params;
typedef struct { int32_t n_tokens; int32_t *token; float *embedding; int32_t *pos; int32_t *n_seq_id;
    int32_t **seq_id; int8_t *logits; } batch;
typedef struct { bool cpumask[512]; int n_threads; int priority; uint32_t poll; bool strict_cpu, paused; } pool_params;

void llama_backend_init(void);
model_params llama_model_default_params(void);
context_params llama_context_default_params(void);
void *llama_model_load_from_file(const char *path, model_params params);
void llama_model_free(void *model);
void *llama_init_from_model(void *model, context_params params);
void llama_free(void *context);
void *llama_get_memory(void *context);
void llama_memory_clear(void *memory, bool data);
batch llama_batch_init(int32_t n_tokens, int32_t embedding, int32_t n_seq_max);
void llama_batch_free(batch batch);
int32_t llama_decode(void *context, batch batch);
float *llama_get_logits_ith(void *context, int32_t index);
const void *llama_model_get_vocab(void *model);
int32_t llama_vocab_n_tokens(const void *vocab);
void llama_log_set(void (*log)(int level, const char *text, void *data), void *data);
void llama_attach_threadpool(void *context, void *pool, void *pool_batch);
const char *llama_version(void);
void ggml_backend_load_all_from_path(const char *folder);
pool_params ggml_threadpool_params_default(int n_threads);
void *ggml_threadpool_new(pool_params *params);
void ggml_threadpool_free(void *pool);
size_t ggml_quantize_chunk(int type, const float *from, void *to, int64_t start, int64_t num_rows, int64_t row_size,
    const float *importance);
size_t ggml_row_size(int type, int64_t num_elements);
"""

LOG_ERROR = 4
PREFILL_BATCH = 512


class Unusable(Exception):
    """Why the libraries cannot be used here."""


class Libraries:
    """The loaded libraries, with the kernels for this processor."""

    def __init__(self, folder: Path) -> None:
        """Raises Unusable."""
        if not folder.is_dir():
            raise Unusable("not installed: make peers")
        self.ffi = FFI()
        self.ffi.cdef(DECLARATIONS)
        self.errors: list[str] = []
        found = [next(folder.glob(name), None) for name in ("libggml-base.so*", "libggml.*so*", "libllama.*so*")]
        try:
            base, ggml, llama = (self.ffi.dlopen(str(path), self.ffi.RTLD_NOW | self.ffi.RTLD_GLOBAL) for path in found)
        except OSError as error:
            raise Unusable(f"its libraries do not load: {error}") from None
        self.base: Any = base
        self.llama: Any = llama
        self._log = self.ffi.callback("void(int, const char *, void *)", self._logged)
        self.llama.llama_log_set(self._log, self.ffi.NULL)
        ggml.ggml_backend_load_all_from_path(str(folder).encode())
        self._check_layout()
        self.llama.llama_backend_init()
        self.cpu: Any = self.ffi.dlopen(_loaded("libggml-cpu"))

    @property
    def version(self) -> str:
        return bytes(self.ffi.string(self.llama.llama_version())).decode()

    def quantise(self, kind: int, rows_NK: np.ndarray) -> np.ndarray:
        """Returns the bytes of each of the rows, in float32, as ggml's type number `kind` has them."""
        num_rows, row_size = rows_NK.shape
        quantised = np.empty((num_rows, self.base.ggml_row_size(kind, row_size)), np.uint8)
        rows, out = self.ffi.from_buffer("float[]", rows_NK), self.ffi.from_buffer(quantised)
        self.base.ggml_quantize_chunk(kind, rows, out, 0, num_rows, row_size, self.ffi.NULL)
        return quantised

    def _check_layout(self) -> None:
        model, context = self.llama.llama_model_default_params(), self.llama.llama_context_default_params()
        of_model: list[Any] = [model.gpu_layers, model.split_mode, model.use_extra_buffers]
        of_context: list[Any] = [context.n_ctx, context.n_batch, context.n_seq_max, context.flash_attention]
        of_context += [context.yarn_fast, context.type_k, context.no_perf]
        if of_model != [-1, 1, True] or of_context != [512, 2048, 1, -1, -1.0, 1, True]:
            raise Unusable(f"its release {self.version} lays its parameters out in another way than {NPM_VERSION}'s")

    def _logged(self, level: int, text: Any, _: Any) -> None:
        if level == LOG_ERROR:
            self.errors.append(bytes(self.ffi.string(text)).decode(errors="replace").strip())


def _loaded(name: str) -> str:
    """Returns the path of a library that this process has loaded."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if name in line:
            return line.split(maxsplit=5)[5]
    raise Unusable(f"it found no {name} for this processor")


class LlamaModel:
    """A GGUF file, mapped, with a context for each number of sequences that was asked for."""

    def __init__(self, libraries: Libraries, path: Path, num_threads: int, context_tokens: int) -> None:
        """Raises Unusable."""
        self._libraries, self._llama, self._ffi = libraries, libraries.llama, libraries.ffi
        self._num_threads, self._context_tokens = num_threads, context_tokens
        self._contexts: dict[int, Any] = {}
        self._model = self._llama.llama_model_load_from_file(
            os.fsencode(path), self._llama.llama_model_default_params()
        )
        if self._model == self._ffi.NULL:
            raise Unusable("; ".join(libraries.errors) or f"{path.name} does not load")
        self._vocabulary = self._llama.llama_vocab_n_tokens(self._llama.llama_model_get_vocab(self._model))
        params = libraries.base.ggml_threadpool_params_default(num_threads)
        self._threads = libraries.cpu.ggml_threadpool_new(self._ffi.new("pool_params *", params))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for context in self._contexts.values():
            self._llama.llama_free(context)
        self._llama.llama_model_free(self._model)
        self._libraries.cpu.ggml_threadpool_free(self._threads)

    def begin(self, prompts: Sequence[Sequence[int]]) -> Callable[[], None]:
        """Runs the prompts, and returns what makes a greedy step of all of them."""
        context = self._cleared(len(prompts))
        tokens = [int(self._run(context, [(row, prompt, 0)])[0].argmax()) for row, prompt in enumerate(prompts)]
        positions = [len(prompt) for prompt in prompts]

        def step() -> None:
            parts = [(row, [token], positions[row]) for row, token in enumerate(tokens)]
            tokens[:] = [int(logits.argmax()) for logits in self._run(context, parts)]
            positions[:] = [position + 1 for position in positions]

        return step

    def logits(self, prompt: Sequence[int]) -> np.ndarray:
        """Returns [V] after the prompt."""
        return self._run(self._cleared(1), [(0, prompt, 0)])[0].copy()

    def _cleared(self, num_rows: int) -> Any:
        """The context for that many sequences, which forgets what it held."""
        if num_rows not in self._contexts:
            params = self._llama.llama_context_default_params()
            params.n_ctx, params.n_seq_max = num_rows * self._context_tokens, num_rows
            params.n_batch = params.n_ubatch = PREFILL_BATCH
            params.n_threads = params.n_threads_batch = self._num_threads
            context = self._llama.llama_init_from_model(self._model, params)
            if context == self._ffi.NULL:
                raise Unusable("; ".join(self._libraries.errors))
            self._llama.llama_attach_threadpool(context, self._threads, self._threads)
            self._contexts[num_rows] = context
        context = self._contexts[num_rows]
        self._llama.llama_memory_clear(self._llama.llama_get_memory(context), True)
        return context

    def _run(self, context: Any, parts: Sequence[tuple[int, Sequence[int], int]]) -> list[np.ndarray]:
        """Runs (row, tokens, position of the first) in one forward; returns the logits [V] after each part."""
        batch = self._llama.llama_batch_init(sum(len(tokens) for _, tokens, _ in parts), 0, 1)
        wanted = []
        for row, tokens, position in parts:
            for offset, token in enumerate(tokens):
                at = batch.n_tokens
                batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, position + offset, 1
                batch.seq_id[at][0], batch.logits[at] = row, offset + 1 == len(tokens)
                batch.n_tokens += 1
            wanted.append(batch.n_tokens - 1)
        failed = self._llama.llama_decode(context, batch)
        self._llama.llama_batch_free(batch)
        if failed:
            raise Unusable(f"llama_decode returned {failed}: {'; '.join(self._libraries.errors[-2:])}")
        pointers = [self._llama.llama_get_logits_ith(context, at) for at in wanted]
        return [np.frombuffer(self._ffi.buffer(pointer, 4 * self._vocabulary), np.float32) for pointer in pointers]
