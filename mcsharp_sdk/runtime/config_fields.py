"""What a compressed model's ``config.json`` may say: no more than is understood here."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from mcsharp_sdk.errors import InputError


def check_fields(where: str, config: Mapping[str, Any], known: Collection[str]) -> None:
    """InputError if the part ``where`` of ``config.json`` has fields other than those known."""
    if unknown := sorted(map(str, config.keys() - set(known))):
        raise InputError(
            f"{where} has {', '.join(unknown)}, which this mcsharp_sdk does not know: "
            "it may be misspelt, or a newer version wrote it"
        )
