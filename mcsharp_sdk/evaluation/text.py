"""The text of an evaluation, its window and its tokens: checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from mcsharp_sdk.arguments import AnyPath, optional_path, whole_number
from mcsharp_sdk.data.corpora import text_pieces
from mcsharp_sdk.data.tokenise import check_vocabulary, load_tokenizer, token_stream
from mcsharp_sdk.embedded.text import evaluation_text
from mcsharp_sdk.errors import InputError
from mcsharp_sdk.evaluation.perplexity import check_window

DEFAULT_WINDOW = 2048
EMBEDDED_TEXT = "embedded evaluation text"


def choose_window(window: int | None, positions: int | None) -> int:
    """Tokens per window; without one, the default or as many as a model has positions.

    Raises
    ------
    InputError
        If it is no whole number, predicts nothing, or is longer than ``positions``.
    """
    if window is None:
        return min(DEFAULT_WINDOW, positions or DEFAULT_WINDOW)
    window = whole_number(window, "window")
    check_window(window)
    if positions and window > positions:
        raise InputError(
            f"a window of {window} is longer than the model's {positions} positions: use "
            f"{positions} or less"
        )
    return window


def check_max_tokens(limit: int | None) -> None:
    """InputError if a number of tokens is no whole number, or too small to predict one."""
    if limit is not None and whole_number(limit, "max_tokens") < 2:
        raise InputError(f"max_tokens is {limit}: perplexity needs 2 tokens or more")


def named_pieces(text: AnyPath | None) -> tuple[str, Iterable[str]]:
    """Name of the evaluation text, and the text in pieces; None for the embedded one."""
    path = optional_path(text, "text", "the file of the text")
    if path is None:
        return EMBEDDED_TEXT, [evaluation_text()]
    return str(text), text_pieces(path)


def read_tokens(
    name: str, pieces: Iterable[str], directory: Path, limit: int | None, vocabulary: int
) -> Tensor:
    """Token ids of a text, (n,) int64, by the tokenizer of a model folder.

    Parameters
    ----------
    name, pieces : of :func:`named_pieces`.
    limit : most tokens; None for all.
    vocabulary : words that the model knows.

    Raises
    ------
    InputError
        If text or tokenizer cannot be read, there are fewer than 2 tokens, or one is none of the
        model's.
    """
    check_max_tokens(limit)
    tokens = token_stream(pieces, load_tokenizer(directory), limit=limit)
    if tokens.numel() < 2:
        raise InputError(f"{name} has fewer than 2 tokens: give a longer text")
    check_vocabulary(tokens, vocabulary)
    return tokens
