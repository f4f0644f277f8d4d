"""What can be said of a ``config.json`` without transformers: whether it is one, and its sizes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mcsharp_sdk.artifact_file import read_json_object
from mcsharp_sdk.errors import InputError
from mcsharp_sdk.folders import CONFIG_FILE, check_model_folder

METHOD = "mcsharp"
"""``quant_method`` of the models that this package compressed."""

MOST_LAYERS = 4096
MOST_OF_ANYTHING = 1 << 40
LAYER_COUNT = re.compile(r"(layers?|depths?|blocks)$")
"""Settings that say how many modules are made, one after the other."""


def check_config(path: Path) -> dict[str, Any]:
    """The content of ``config.json``, in which no size is beyond all that is known.

    Raises
    ------
    InputError
        If there is none, it is no JSON object, or it gives a size that would take up all memory or
        time before it is found out to be wrong.
    """
    check_model_folder(path)
    file = path / CONFIG_FILE
    try:
        config = read_json_object(file)
    except InputError as error:
        raise InputError(f"{file} {error}") from None
    for name, value in _settings(config):
        most = MOST_LAYERS if LAYER_COUNT.search(name) else MOST_OF_ANYTHING
        numbers = value if isinstance(value, list) else [value]
        # Only whole numbers are sizes; a float may be as large as it likes, even infinite.
        if any(isinstance(n, int) and abs(n) > most for n in numbers):
            raise InputError(f"{file}: {name} is {value}: more than {most} cannot be")
    return config


def _settings(config: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Name and value of every setting, also in the parts of a config."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _settings(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def check_layer_count(config: Any, path: Path, tensors: int | None = None) -> None:
    """InputError if a config asks for more decoder layers than can be, or than there are tensors.

    Parameters
    ----------
    path : the model's folder, for the message.
    tensors : how many are stored; None if that is not known.
    """
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if not isinstance(layers, int):
        return
    if layers > MOST_LAYERS:
        too_many = f"num_hidden_layers is {layers}: more than {MOST_LAYERS} cannot be"
        raise InputError(f"{path / CONFIG_FILE}: {too_many}")
    if tensors is not None and layers > tensors:
        raise InputError(
            f"{path / CONFIG_FILE} says {layers} layers, but {tensors} tensors are stored"
        )


def quantisation_method(config: Any) -> str | None:
    """``quant_method`` of a config whose weights are quantised; None if they are not."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        settings = getattr(config.get_text_config(), "quantization_config", None)
    if settings is None:
        return None
    found = settings if isinstance(settings, dict) else settings.to_dict()
    return str(found.get("quant_method", "not named"))
