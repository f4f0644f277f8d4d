"""Text to tokens and windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mcsharp_sdk.data import EmbeddedSource, TextSource, tokenise
from mcsharp_sdk.data.tokenise import (
    calibration_tokens,
    choose_windows,
    cut_windows,
    load_tokenizer,
    token_stream,
)
from mcsharp_sdk.embedded import evaluation_text
from mcsharp_sdk.errors import InputError

WORDS = [f"word{number}" for number in range(60)]


def wrapped(tokenizer: Tokenizer, trainer: Any, text: str) -> PreTrainedTokenizerFast:
    tokenizer.train_from_iterator(text.split("\n\n"), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def byte_level(text: str) -> PreTrainedTokenizerFast:
    """As GPT-2's: words are split off before merging."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    return wrapped(tokenizer, trainer, text)


def sentence_piece_like(text: str) -> PreTrainedTokenizerFast:
    """As Mixtral's: the start of a text gets a mark, and merges may cross words."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>"], show_progress=False)
    return wrapped(tokenizer, trainer, text)


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    """One token per word, its number."""
    vocabulary = {word: number for number, word in enumerate([*WORDS, "<unk>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """1000 words: word i is number i mod 60."""
    path = tmp_path / "corpus.txt"
    path.write_text(" ".join(WORDS[i % 60] for i in range(1000)))
    return path


@pytest.mark.parametrize("make", [byte_level, sentence_piece_like])
@pytest.mark.parametrize("piece", [100, 3_000, 1 << 20])
def test_blocks_give_exactly_the_tokens_of_the_whole(
    make: Any, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = evaluation_text()[:40_000] + " äöü€𝄞" * 300
    tokenizer = make(text)
    whole = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    monkeypatch.setattr(tokenise, "BLOCK", 3_000)
    monkeypatch.setattr(tokenise, "OVERLAP", 400)
    pieces = [text[i : i + piece] for i in range(0, len(text), piece)]
    assert torch.equal(token_stream(pieces, tokenizer), whole)
    assert torch.equal(token_stream(text, tokenizer), whole)


def test_a_text_without_a_common_place_differs_by_no_more_than_the_overlaps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = "ab" * 5_000
    tokenizer = byte_level("abab")
    monkeypatch.setattr(tokenise, "BLOCK", 1_000)
    monkeypatch.setattr(tokenise, "OVERLAP", 10)
    found = str(tokenizer.decode(token_stream(text, tokenizer)))
    assert set(found.split("ab")) == {""}
    assert abs(len(text) - len(found)) <= 10 * len(text) // 1_000


def test_no_special_tokens_are_added(words: PreTrainedTokenizerFast) -> None:
    assert token_stream("word3 word1", words).tolist() == [3, 1]
    assert token_stream("", words).dtype == torch.int64
    assert token_stream("", words).numel() == 0


def test_a_limit_reads_no_further_than_needed(
    words: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenise, "BLOCK", 200)
    monkeypatch.setattr(tokenise, "OVERLAP", 100)
    read = 0

    def endless() -> Any:
        nonlocal read
        while True:
            read += 1
            yield " ".join(WORDS) + " "

    assert token_stream(endless(), words, limit=130).tolist() == [i % 60 for i in range(130)]
    assert read < 10


@settings(max_examples=50, deadline=None)
@given(
    count=st.integers(1, 300),
    share=st.floats(0.01, 1),
    seed=st.integers(0, 5),
    sampling=st.sampled_from(["random", "first"]),
)
def test_chosen_windows_are_distinct_ascending_and_repeatable(
    count: int, share: float, seed: int, sampling: Any
) -> None:
    wanted = max(1, int(count * share))
    source = EmbeddedSource(sequences=wanted, length=1, seed=seed, sampling=sampling)
    chosen = choose_windows(count, source)
    assert chosen.numel() == wanted
    assert sorted(set(chosen.tolist())) == chosen.tolist()
    assert 0 <= int(chosen.min()) <= int(chosen.max()) < count
    assert torch.equal(chosen, choose_windows(count, source))


@settings(max_examples=50, deadline=None)
@given(tokens=st.integers(0, 200), length=st.integers(1, 50))
def test_windows_put_together_are_the_stream_without_its_tail(tokens: int, length: int) -> None:
    windows = cut_windows(torch.arange(tokens), length)
    assert windows.shape == (tokens // length, length)
    assert windows.flatten().tolist() == list(range(tokens // length * length))


def test_sequences_are_disjoint_windows_of_the_text(
    words: PreTrainedTokenizerFast, corpus: Path
) -> None:
    source = TextSource(path=corpus, sequences=20, length=50)
    tokens = calibration_tokens(source, words, vocab_size=61)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, (torch.arange(1000) % 60).view(20, 50))


def test_the_seed_chooses_and_first_takes_the_start(
    words: PreTrainedTokenizerFast, corpus: Path
) -> None:
    def drawn(**changes: Any) -> torch.Tensor:
        source = TextSource(path=corpus, sequences=4, length=7, **changes)
        return calibration_tokens(source, words)

    assert torch.equal(drawn(sampling="first"), torch.arange(28).view(4, 7))
    assert torch.equal(drawn(seed=1), drawn(seed=1))
    assert not torch.equal(drawn(seed=1), drawn(seed=2))


def test_random_windows_come_from_a_bounded_part_of_the_text(
    words: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenise, "RANDOM_SCOPE", 3)
    path = tmp_path / "a.txt"
    path.write_text(" ".join(WORDS[i // 100] for i in range(6000)))
    source = TextSource(path=path, sequences=10, length=10)
    assert set(calibration_tokens(source, words).flatten().tolist()) == {0, 1, 2}


def test_too_little_text_says_how_much_there_is(
    words: PreTrainedTokenizerFast, corpus: Path
) -> None:
    with pytest.raises(
        InputError, match=r"has 1000 tokens, which make 20 sequences of 50.*set 'sequences: 20'"
    ):
        calibration_tokens(TextSource(path=corpus, sequences=21, length=50), words)
    with pytest.raises(InputError, match="set 'length' to 1000 or less"):
        calibration_tokens(TextSource(path=corpus, sequences=1, length=1001), words)


def test_a_tokenizer_of_another_model_is_refused(
    words: PreTrainedTokenizerFast, corpus: Path
) -> None:
    source = TextSource(path=corpus, sequences=20, length=50)
    with pytest.raises(InputError, match="larger vocabulary than the model: token 59"):
        calibration_tokens(source, words, vocab_size=59)


def test_a_saved_tokenizer_is_loaded_and_a_missing_one_is_named(
    words: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    words.save_pretrained(tmp_path / "model")
    assert token_stream("word5", load_tokenizer(tmp_path / "model")).tolist() == [5]
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match=r"none: no tokenizer could be read.*tokenizer\.json"):
        load_tokenizer(tmp_path / "none")
