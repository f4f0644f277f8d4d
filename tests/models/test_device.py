"""Names of devices that cannot be used."""

from __future__ import annotations

import pytest
import torch

from mcsharp_sdk.errors import InputError
from mcsharp_sdk.models.device import check_device


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("gpu", "; did you mean 'cuda'?"),
        ("gpu:1", "; did you mean 'cuda'?"),
        ("cud", "; did you mean 'cuda'?"),
        ("cpus", "; did you mean 'cpu'?"),
        ("abacus", ""),
    ],
)
def test_a_name_that_is_none_is_told_what_there_is(name: str, meant: str) -> None:
    with pytest.raises(InputError) as caught:
        check_device(name)
    assert str(caught.value) == f"device '{name}' cannot be used: give cpu, cuda or cuda:N{meant}"


def test_cuda_without_a_gpu_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"use cpu or, .* pip install 'mcsharp_sdk\[gpu\]'"):
        check_device("cuda")


def test_the_cpu_can_be_used() -> None:
    check_device("cpu")
    check_device("cpu:0")
