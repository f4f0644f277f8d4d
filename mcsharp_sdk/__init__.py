"""mcsharp_sdk: mixed-precision compression for Mixture-of-Experts models.

Importing it lets transformers load compressed models: ``from_pretrained`` knows the format then.
The verbs of the command line are functions here; each is imported when it is first used.

================== ==================================================================
``Recipe``         what to do to a model, checked in full when it is read
``plan``           what ``compress`` would do, and what it would take
``compress``       make a compressed model as a recipe says
``inspect``        layers, experts, router, bytes and bit widths of a model folder
``verify``         read a model folder to its last byte, and say what is wrong
``evaluate``       perplexity and size of a model
``compare``        several models on one text, and how far they are from the original
``evaluate_tasks`` a model's results in tasks of lm-eval
``sweep``          variants of a recipe, compressed, evaluated and compared
``allocate``       widths from expert statistics alone, without a model
``export``         write a finished model down in another form
================== ==================================================================

Errors that are raised on purpose are in ``mcsharp_sdk.errors``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import wrapt

from mcsharp_sdk import errors
from mcsharp_sdk._version import __version__

if TYPE_CHECKING:
    from mcsharp_sdk.engine.export import export
    from mcsharp_sdk.engine.plan import plan
    from mcsharp_sdk.engine.run import compress
    from mcsharp_sdk.engine.sweep import sweep
    from mcsharp_sdk.evaluation.comparison import compare
    from mcsharp_sdk.evaluation.evaluate import evaluate
    from mcsharp_sdk.evaluation.inspection import inspect
    from mcsharp_sdk.evaluation.tasks import evaluate_tasks
    from mcsharp_sdk.evaluation.verification import verify
    from mcsharp_sdk.modifiers.width_allocation import allocate
    from mcsharp_sdk.recipe.schema import Recipe

__all__ = [
    "Recipe",
    "__version__",
    "allocate",
    "compare",
    "compress",
    "errors",
    "evaluate",
    "evaluate_tasks",
    "export",
    "inspect",
    "plan",
    "sweep",
    "verify",
]

_HOMES = {
    "Recipe": "mcsharp_sdk.recipe.schema",
    "allocate": "mcsharp_sdk.modifiers.width_allocation",
    "compare": "mcsharp_sdk.evaluation.comparison",
    "compress": "mcsharp_sdk.engine.run",
    "evaluate": "mcsharp_sdk.evaluation.evaluate",
    "evaluate_tasks": "mcsharp_sdk.evaluation.tasks",
    "export": "mcsharp_sdk.engine.export",
    "inspect": "mcsharp_sdk.evaluation.inspection",
    "plan": "mcsharp_sdk.engine.plan",
    "sweep": "mcsharp_sdk.engine.sweep",
    "verify": "mcsharp_sdk.evaluation.verification",
}


_PLUG_INS = {
    "transformers.modeling_utils": "mcsharp_sdk.runtime.hf_quantizer",
    "transformers.models.auto.configuration_auto": "mcsharp_sdk.models.deepseek_vl2.configuration",
    "transformers.models.auto.processing_auto": "mcsharp_sdk.models.deepseek_vl2.processing",
}
"""Module of transformers -> ours that registers something with it, once it is there.

So importing this package does not import transformers, which takes seconds.
"""


def _plug_in(theirs: Any) -> None:
    import_module(_PLUG_INS[theirs.__name__])


for _name in _PLUG_INS:
    wrapt.register_post_import_hook(_plug_in, _name)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mcsharp_sdk' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
