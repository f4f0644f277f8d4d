"""Time the kernels on what a model multiplies by, and keep which is fastest for how many tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from mcsharp_sdk.arguments import AnyPath
from mcsharp_sdk.evaluation.kernel_choice import products_of
from mcsharp_sdk.evaluation.loading import AnyDtype
from mcsharp_sdk.kernels import crossovers
from mcsharp_sdk.kernels.case import Case, LayerCase
from mcsharp_sdk.kernels.timed_cases import time_layer, time_product
from mcsharp_sdk.models.device import AnyDevice

Track = Callable[[list[Case | LayerCase]], Iterable[Case | LayerCase]]


def measure_kernels(
    model_dir: AnyPath, device: AnyDevice = "auto", dtype: AnyDtype = "auto", track: Track = iter
) -> Path:
    """Time what a model folder multiplies by, on random weights of its shapes.

    What is found is kept as it comes, and products are done by it from now on, in this process and
    in later ones.

    Parameters
    ----------
    device : ``auto`` for the GPU where there is one, else the CPU.
    dtype : of the activations; ``auto`` for the one that evaluation on this device takes.
    track : iterates over what is to be timed, for example with a progress bar.

    Returns
    -------
    The file that it is kept in.

    Raises
    ------
    InputError
        If the folder is no model or has no packed matrices, there is no such device or dtype, or
        the file is something else, cannot be written, or is switched off.
    """
    products = products_of(model_dir, device, dtype)
    cases: dict[str, Case | LayerCase] = {case.key(): case for _, case in products.matrices}
    cases |= {case.key(): case for case in products.layers}
    file = crossovers.save(products.device, {})  # whether it can be, before anything is timed
    for case in track(list(cases.values())):
        steps = time_layer(case) if isinstance(case, LayerCase) else time_product(case)
        crossovers.save(products.device, {case.key(): steps})
    return file
