"""Pairs of an image and a text from JSON lines, and what a model's processor makes of them.

Image paths start at the folder of the JSON lines and may not leave it, neither by ``..`` nor by a
link. The processor is the model's own, from its folder; no code of the model is run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mcsharp_sdk.data.calibration import ImageTextSource
from mcsharp_sdk.data.corpora import check_characters, json_object
from mcsharp_sdk.data.tokenise import choose_windows
from mcsharp_sdk.errors import InputError

INSTALL_PILLOW = "pip install 'mcsharp_sdk[vision]'"

IMAGE_TOKENS = ("image_token_id", "image_token_index")
"""Names of the setting, of a config or a processor, that holds the id of image tokens."""


@dataclass(frozen=True)
class Pair:
    """An image and its text; ``where`` is the file and line that they come from."""

    image: Path
    text: str
    where: str


def read_pairs(settings: ImageTextSource) -> list[Pair]:
    """The pairs that the settings choose, in the order of the file.

    Raises
    ------
    InputError
        If a line is no pair, an image path leaves the folder or names no file, or there are fewer
        pairs than asked for.
    """
    rows = list(_rows(settings))
    wanted = settings.sequences
    if len(rows) < wanted:
        raise InputError(
            f"{settings.path}: has {len(rows)} pairs, but {wanted} are asked for; "
            + (f"set 'sequences: {len(rows)}', or give more" if rows else "give some")
        )
    chosen = choose_windows(len(rows), settings)
    folder = settings.path.absolute().parent.resolve()
    return [
        Pair(_inside(folder, name, where), text, where)
        for name, text, where in (rows[index] for index in chosen.tolist())
    ]


def _rows(settings: ImageTextSource) -> Iterator[tuple[str, str, str]]:
    """Image name, text and place of every line."""
    path = settings.path
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path}:{number}"
            row = json_object(line, where)
            yield _text(row, settings.image, where), _text(row, settings.text, where), where


def _text(row: Mapping[str, Any], field: str, where: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        there = ", ".join(repr(name) for name in row) or "no field at all"
        raise InputError(f"{where}: field '{field}' must be a text; there is {there}")
    check_characters(value, field, where)
    return value


def _inside(folder: Path, name: str, where: str) -> Path:
    """The image's path; links are followed before it is checked that it lies in the folder."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise InputError(f"{where}: image '{name}' must be a path below the file's own folder")
    try:
        full = (folder / path).resolve()
        is_file = full.is_file()
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{where}: image '{name}' cannot be looked up: {error}") from error
    if not full.is_relative_to(folder):
        raise InputError(f"{where}: image '{name}' is a link that leads out of {folder}")
    if not is_file:
        raise InputError(f"{where}: there is no image '{name}' in {folder}")
    return full


def load_processor(model_dir: Path) -> Any:
    """The processor in a model folder.

    Raises
    ------
    InputError
        If Pillow is missing, or there is no processor that transformers can read.
    """
    _pillow()
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(
            str(model_dir), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # which exception depends on the kind of processor
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"{model_dir}: no processor for images could be read ({reason}); "
            "put the model's preprocessor_config.json and tokenizer there"
        ) from error


def pair_inputs(pair: Pair, processor: Any, config: Any, length: int) -> dict[str, Tensor]:
    """Model inputs of one pair: ``input_ids`` (1, n) with n at most ``length``, pixels and more.

    Parameters
    ----------
    processor, config : of the model.

    Raises
    ------
    InputError
        If the image cannot be read, the processor fails, or the image does not fit.
    """
    image = _open_image(pair)
    prompt = _prompt(pair, processor)
    try:
        made = processor(text=[prompt], images=[image], return_tensors="pt")
    except Exception as error:  # whatever the processor's parts raise
        raise InputError(f"{pair.where}: the model's processor refuses it: {error}") from error
    # There is no padding, so an attention mask says nothing.
    inputs = {k: v for k, v in made.items() if isinstance(v, Tensor) and k != "attention_mask"}
    inputs["input_ids"] = inputs["input_ids"].long()
    return _cut(inputs, length, _image_token(processor, config), pair.where)


def _prompt(pair: Pair, processor: Any) -> str:
    """Image and text as the model's chat template has them, or one after the other."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": pair.text}]
        messages = [{"role": "user", "content": content}]
        try:
            return str(processor.apply_chat_template(messages, tokenize=False))
        except Exception as error:  # a template may raise anything
            raise InputError(f"{pair.where}: the chat template refuses it: {error}") from error
    token = getattr(processor, "image_token", None)
    if token is None:
        raise InputError("the model's processor has neither a chat template nor an image token")
    return f"{token}{pair.text}"


def _cut(
    inputs: dict[str, Tensor], length: int, image_token: int | None, where: str
) -> dict[str, Tensor]:
    """The first ``length`` tokens, if all tokens of the image are among them."""
    tokens = inputs["input_ids"]
    count = tokens.shape[1]
    if count <= length:
        return inputs
    images = torch.zeros(0) if image_token is None else (tokens[0] == image_token).nonzero()
    if not images.numel() or int(images[-1]) >= length:
        raise InputError(
            f"{where}: has {count} tokens, and {length} do not hold the image: set a larger "
            "'length', or make the image smaller"
        )
    return {k: v[:, :length] if v.shape == tokens.shape else v for k, v in inputs.items()}


def _image_token(processor: Any, config: Any) -> int | None:
    found = (getattr(owner, name, None) for owner in (processor, config) for name in IMAGE_TOKENS)
    return next((token for token in found if isinstance(token, int)), None)


def _open_image(pair: Pair) -> Any:
    image_module = _pillow()
    try:
        with image_module.open(pair.image) as image:
            return image.convert("RGB")
    except Exception as error:  # decoders raise many kinds, and one for too many pixels
        raise InputError(f"{pair.where}: image {pair.image} cannot be read: {error}") from error


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise InputError(f"calibration on images needs Pillow: {INSTALL_PILLOW}") from error
    return Image
