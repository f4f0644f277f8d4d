"""Run an exported model with onnxruntime: logits, greedy tokens, perplexity.

torch need not be installed, but for :meth:`OnnxModel.logits`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mcsharp_exporters.graph_names import (
    ATTENTION_MASK,
    CACHED,
    INPUT_IDS,
    LOGITS,
    PAST,
    PRESENT,
)
from mcsharp_exporters.onnx_manifest import GRAPH, check_files, read_manifest
from mcsharp_exporters.onnxruntime_session import (
    CUDA,
    ProviderChoice,
    check_provider,
    execution_providers,
    import_onnxruntime,
    open_session,
)
from mcsharp_sdk.arguments import LONG_DTYPES, AnyPath, path_argument, whole_number
from mcsharp_sdk.errors import InputError
from mcsharp_sdk.models.logits import positions_at_once
from mcsharp_sdk.models.memory import keep_large_blocks_out_of_the_heap, release_free_memory

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens that were read.

    Attributes
    ----------
    values : name of the graph's input -> (batch, heads, positions, head_size).
    mask : int64 (batch, positions), 1 where there is a token.
    """

    values: Mapping[str, np.ndarray]
    mask: np.ndarray


class OnnxModel:
    """An exported folder, ready to run.

    Parameters
    ----------
    folder : as written by ``export_onnx_model``.
    provider : ``cuda``, ``cpu``, or ``auto``: CUDA where it works, else the CPU.
    threads : of onnxruntime; None for its default, one per core.
    hashes : compare every file's SHA-256 with the manifest; otherwise only their sizes.

    Attributes
    ----------
    manifest : of the folder.
    provider : that really runs.

    Raises
    ------
    InputError
        If the manifest is bad, a file is missing, cut short or changed, or ``threads`` is below 1.
    RunError
        If onnxruntime is not installed or cannot open the model.
    """

    def __init__(
        self,
        folder: AnyPath,
        provider: ProviderChoice = "auto",
        *,
        threads: int | None = None,
        hashes: bool = True,
    ) -> None:
        check_provider(provider)
        if threads is not None and whole_number(threads, "threads") < 1:
            raise InputError(f"threads is {threads}: give 1 or more, or None for the default")
        folder = path_argument(folder, "folder", "the folder of the exported model")
        self.manifest = read_manifest(folder)
        self.manifest.entry(GRAPH)
        check_files(folder, self.manifest, hashes=hashes)
        keep_large_blocks_out_of_the_heap()
        ort = import_onnxruntime()
        providers = execution_providers(ort, provider, strict=False)
        self._session = open_session(ort, folder / GRAPH, providers, threads=threads)
        release_free_memory()  # what decoding the weights took
        self.provider: str = self._session.get_providers()[0]
        if provider == "cuda" and self.provider != CUDA:
            warnings.warn(f"CUDA is not there: the model runs on {self.provider}", stacklevel=2)
        self._dtype = np.dtype(LONG_DTYPES[self.manifest.precision])

    def __call__(
        self, ids: np.ndarray, cache: Cache | None = None, mask: np.ndarray | None = None
    ) -> tuple[np.ndarray, Cache]:
        """Read tokens.

        Parameters
        ----------
        ids : (batch, sequence) int64. A batch of several rows is read at once, or token by token.
        cache : of the tokens before; None to begin.
        mask : (batch, sequence) int64, 0 where a row has no token: rows of a first call may be
            padded at their end. None for all 1.

        Returns
        -------
        logits, cache
            (batch, sequence, vocabulary) in the model's precision, and what the next call needs.

        Raises
        ------
        InputError
            If types or shapes do not fit, a token is none of the vocabulary, or there are more
            tokens than positions.
        """
        _check_types(ids, cache, mask)
        cache = cache or self._empty_cache(len(ids))
        mask = np.ones(ids.shape, np.int64) if mask is None else mask.astype(np.int64)
        self._check(ids, cache, mask)
        seen = np.concatenate([cache.mask, mask], axis=1)
        inputs = {INPUT_IDS: ids.astype(np.int64), ATTENTION_MASK: seen, **cache.values}
        logits, *present = self._session.run(self._outputs, inputs)
        return logits, Cache(dict(zip(self._cached(PAST), present, strict=True)), seen)

    def generate(
        self, prompt: np.ndarray, new_tokens: int, stop: frozenset[int] = frozenset()
    ) -> Iterator[int]:
        """The most likely next tokens, one by one.

        Parameters
        ----------
        prompt : (tokens,) int64.
        new_tokens : at most so many.
        stop : tokens after which nothing follows; they are yielded too.
        """
        ids, cache = np.asarray(prompt, np.int64)[None], None
        for _ in range(new_tokens):
            logits, cache = self(ids, cache)
            token = int(logits[0, -1].argmax())
            yield token
            if token in stop:
                return
            ids = np.array([[token]], np.int64)

    def logits(self, windows: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Positions (p,) but the last and float32 logits (1, p, vocabulary) there, in pieces.

        Parameters
        ----------
        windows : (1, n) int64: one row, which is read in pieces through the cache.
        """
        import torch

        ids = windows.numpy()
        length = positions_at_once(self.manifest.vocabulary)
        cache = None
        for start in range(0, ids.shape[1] - 1, length):
            stop = min(start + length, ids.shape[1] - 1)
            logits, cache = self(ids[:, start:stop], cache)
            yield torch.arange(start, stop), torch.from_numpy(logits.astype(np.float32))

    @property
    def _outputs(self) -> list[str]:
        return [LOGITS, *self._cached(PRESENT)]

    def _cached(self, name: str) -> list[str]:
        layers = range(self.manifest.layers)
        return [name.format(layer=layer, part=part) for layer in layers for part in CACHED]

    def _empty_cache(self, batch: int) -> Cache:
        shape = (batch, self.manifest.cache_heads, 0, self.manifest.head_size)
        values = {name: np.zeros(shape, self._dtype) for name in self._cached(PAST)}
        return Cache(values, np.zeros((batch, 0), np.int64))

    def _check(self, ids: np.ndarray, cache: Cache, mask: np.ndarray) -> None:
        if ids.ndim != 2 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
            raise InputError(f"tokens are integers (batch, sequence), got {ids.dtype} {ids.shape}")
        if mask.shape != ids.shape or len(cache.mask) != len(ids):
            raise InputError(
                f"{ids.shape} tokens do not go with a mask of {mask.shape} and a cache of "
                f"{len(cache.mask)} rows"
            )
        if ids.min() < 0 or ids.max() >= self.manifest.vocabulary:
            raise InputError(
                f"token {ids.max() if ids.min() >= 0 else ids.min()} is none of the model's "
                f"{self.manifest.vocabulary}"
            )
        if len(ids) > 1 and ids.shape[1] > 1 and cache.mask.shape[1]:
            raise InputError(
                "several rows are read at once, or token by token: onnxruntime does not read them "
                "in pieces"
            )
        if (np.diff(mask, axis=1) > 0).any():
            raise InputError("rows are padded at their end, not before a token")
        total = cache.mask.shape[1] + ids.shape[1]
        if total > self.manifest.context_length:
            raise InputError(
                f"{total} tokens are more than {self.manifest.context_length} positions"
            )


def _check_types(ids: object, cache: object, mask: object) -> None:
    """Refuse what has no shapes to check."""
    for what, given in (("tokens", ids), ("mask", mask)):
        if not isinstance(given, np.ndarray) and (given is not None or what == "tokens"):
            raise InputError(f"{what}: a numpy array is needed, not {type(given).__name__}")
    if cache is not None and not isinstance(cache, Cache):
        raise InputError(f"cache: what an earlier call gave is needed, not {type(cache).__name__}")
