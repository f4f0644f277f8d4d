"""Text to tokens: one stream over the whole text, cut into windows of equal length.

No special tokens are added: the tokens are those of the text. Windows do not overlap, and what does
not fill the last one is left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mcsharp_sdk.data.calibration import RANDOM_SCOPE, Calibration
from mcsharp_sdk.data.corpora import calibration_name, calibration_pieces
from mcsharp_sdk.errors import InputError

BLOCK = 2**15
"""Characters that are tokenised at once, for which tokenizers take some 500 times as many bytes."""

OVERLAP = 2048
"""Characters that consecutive blocks share, so that the seam can be put where both agree."""

AGREEMENT = 8
"""Tokens in a row that must agree at a seam."""

LEAST_KNOWN = 0.5
"""Least share of a model's tokens that its own tokenizer knows."""

TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.*",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer*",
    "video_preprocessor_config.json",
    "vocab.*",
)
"""Files of a model folder that decide which inputs a text or an image becomes."""


def tokenizer_files(model_dir: Path) -> list[Path]:
    """The files of a model folder that are of :data:`TOKENIZER_FILES`, by name."""
    found = {file for pattern in TOKENIZER_FILES for file in model_dir.glob(pattern)}
    return sorted(file for file in found if file.is_file())


def check_tokenizer_files(model_dir: Path) -> None:
    """InputError if a tokenizer's file that is named as JSON is none: a result takes it over."""
    for file in tokenizer_files(model_dir):
        if file.suffix == ".json":
            try:
                json.loads(file.read_bytes())
            except ValueError as error:
                raise InputError(f"{file}: is not JSON: {error}; get the file again") from None


def load_tokenizer(model_dir: Path) -> Any:
    """The tokenizer in a model directory; nothing is downloaded and no code of the model is run.

    Raises
    ------
    InputError
        If there is none that transformers can read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(model_dir), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # which exception depends on the kind of tokenizer
        reason = str(error).strip().split("\n")[0].rstrip()
        told = "" if reason.endswith(":") else f" ({reason})"  # else what follows is cut off
        raise InputError(
            f"{model_dir}: no tokenizer could be read{told}; put the model's tokenizer.json there"
        ) from error


def token_stream(text: str | Iterable[str], tokenizer: Any, *, limit: int | None = None) -> Tensor:
    """All tokens of a text as one stream.

    A text longer than ``BLOCK`` characters is tokenised in overlapping blocks that are put together
    where both have the same tokens at the same places: the result is that of tokenising the whole,
    unless a text has no such place (one word longer than ``OVERLAP``): then the tokens at
    the seam are not exact. Tokenizers without offsets, those not backed by the
    ``tokenizers`` library, get the whole text at once.

    Parameters
    ----------
    text : a text, or pieces that make one when put together.
    limit : read no further than is needed for so many tokens, and return no more.

    Returns
    -------
    (tokens,) int64.
    """
    pieces = [text] if isinstance(text, str) else text
    if not tokenizer.is_fast:
        return torch.tensor(_encode(tokenizer, "".join(pieces))["input_ids"][:limit]).long()
    parts: list[np.ndarray] = []
    count = 0
    for part in _stitched(_encoded_blocks(pieces, tokenizer)):
        parts.append(part)
        count += part.size
        if limit is not None and count >= limit:
            break
    stream = np.concatenate(parts) if parts else np.empty(0)
    return torch.from_numpy(stream[:limit].astype(np.int64))


def calibration_tokens(
    settings: Calibration, tokenizer: Any, vocab_size: int | None = None
) -> Tensor:
    """Calibration sequences as the settings ask for.

    Parameters
    ----------
    vocab_size : rows of the model's embedding; a token beyond is an error.

    Returns
    -------
    (sequences, length) int64, in the order of the text.

    Raises
    ------
    InputError
        If the text cannot be read, is too short, or the tokenizer is not the model's.
    """
    wanted = settings.sequences * settings.length
    limit = wanted * (RANDOM_SCOPE if settings.sampling == "random" else 1)
    stream = token_stream(calibration_pieces(settings), tokenizer, limit=limit)
    windows = cut_windows(stream, settings.length)
    if windows.shape[0] < settings.sequences:
        raise InputError(_too_little(settings, stream.numel(), windows.shape[0]))
    tokens = windows[choose_windows(windows.shape[0], settings)]
    check_vocabulary(tokens, vocab_size)
    return tokens


def check_tokenizer(tokenizer: Any, vocab_size: int, model_dir: Path) -> None:
    """InputError if a tokenizer knows so few of the model's tokens that it is another model's.

    Embeddings are often padded by a few percent, so a somewhat smaller vocabulary is usual.
    """
    known = len(tokenizer)
    if known < LEAST_KNOWN * vocab_size:
        raise InputError(
            f"{model_dir}: the tokenizer knows {known} tokens, the model {vocab_size}: it is "
            "another model's; put the tokenizer.json there that belongs to the model"
        )


def check_vocabulary(tokens: Tensor, vocab_size: int | None) -> None:
    """InputError if a token is none of the model's, which knows 0 to ``vocab_size - 1``."""
    highest = int(tokens.max())
    if vocab_size is not None and highest >= vocab_size:
        raise InputError(
            f"the tokenizer has a larger vocabulary than the model: token {highest} occurs, but "
            f"the model knows 0 to {vocab_size - 1}; use the tokenizer that belongs to the model"
        )


def cut_windows(stream: Tensor, length: int) -> Tensor:
    """(tokens,) -> (tokens // length, length), consecutive windows; the tail is left out."""
    count = stream.numel() // length
    return stream[: count * length].view(count, length)


def choose_windows(count: int, settings: Calibration) -> Tensor:
    """(sequences,) int64, ascending: which of ``count`` windows, or pairs, to take, none twice."""
    if settings.sampling == "first":
        return torch.arange(settings.sequences)
    generator = torch.Generator().manual_seed(settings.seed)
    return torch.randperm(count, generator=generator)[: settings.sequences].sort().values


def _too_little(settings: Calibration, tokens: int, windows: int) -> str:
    remedy = (
        f"set 'sequences: {windows}', a smaller 'length', or give more text"
        if windows
        else f"set 'length' to {tokens} or less, or give more text"
    )
    return (
        f"{calibration_name(settings)}: has {tokens} tokens, which make {windows} sequences of "
        f"{settings.length}, but {settings.sequences} are asked for; {remedy}"
    )


@dataclass(frozen=True)
class _Block:
    """A tokenised block: ids (n,), and where in the whole text each token starts (n,)."""

    ids: np.ndarray
    starts: np.ndarray


def _encode(tokenizer: Any, text: str, **options: Any) -> Any:
    return tokenizer(text, add_special_tokens=False, verbose=False, **options)


def _encoded_blocks(pieces: Iterable[str], tokenizer: Any) -> Iterator[_Block]:
    for offset, block in _blocks(pieces):
        encoding = _encode(tokenizer, block, return_offsets_mapping=True)
        spans = np.asarray(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        yield _Block(np.asarray(encoding["input_ids"], dtype=np.int32), spans[:, 0] + offset)


def _blocks(pieces: Iterable[str]) -> Iterator[tuple[int, str]]:
    """(offset, text) of blocks of at least ``BLOCK`` characters that share ``OVERLAP``."""
    waiting: list[str] = []
    size = offset = 0
    for piece in _sliced(pieces):
        waiting.append(piece)
        size += len(piece)
        if size >= BLOCK + OVERLAP:
            text = "".join(waiting)
            yield offset, text
            waiting, offset = [text[-OVERLAP:]], offset + size - OVERLAP
            size = OVERLAP
    if size > (OVERLAP if offset else 0):
        yield offset, "".join(waiting)


def _sliced(pieces: Iterable[str]) -> Iterator[str]:
    for piece in pieces:
        for start in range(0, len(piece), BLOCK):
            yield piece[start : start + BLOCK]


def _stitched(blocks: Iterable[_Block]) -> Iterator[np.ndarray]:
    """Token ids of consecutive overlapping blocks, each token once."""
    previous: _Block | None = None
    for block in blocks:
        if previous is not None:
            end, begin = _seam(previous, block)
            yield previous.ids[:end]
            block = _Block(block.ids[begin:], block.starts[begin:])
        previous = block
    if previous is not None:
        yield previous.ids


def _seam(left: _Block, right: _Block) -> tuple[int, int]:
    """Where to change from one block to the next: an index into each.

    The first place in the later half of the overlap where ``AGREEMENT`` tokens in a row are equal:
    at its start the right block may lack context, at its end the left block does. Failing that,
    the last place where a token of both begins; failing that, the end of the left block.
    """
    first = np.searchsorted(left.starts, right.starts[0] + OVERLAP // 2)
    for index in range(int(first), left.ids.size - AGREEMENT + 1):
        other = _at(right, left.starts[index])
        here, there = slice(index, index + AGREEMENT), slice(other, other + AGREEMENT)
        if np.array_equal(left.ids[here], right.ids[there]) and np.array_equal(
            left.starts[here], right.starts[there]
        ):
            return index, other
    common = np.intersect1d(left.starts[first:], right.starts)
    if common.size:
        return _at(left, common[-1]), _at(right, common[-1])
    return left.ids.size, int(np.searchsorted(right.starts, left.starts[-1], side="right"))


def _at(block: _Block, place: int) -> int:
    """Index of the first token that starts at ``place`` or behind it."""
    return int(np.searchsorted(block.starts, place))
