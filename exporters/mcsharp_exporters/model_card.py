"""The README of a compressed model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_CARD = """---
library_name: transformers
tags:
- mcsharp
- mixture-of-experts
---

# {name}, compressed

{summary}

```python
import mcsharp_sdk  # lets transformers read this format
from transformers import {model_class}, {input_class}

model = {model_class}.from_pretrained("path/to/this/folder")
{inputs} = {input_class}.from_pretrained("path/to/this/folder")
```

The licence is that of `{name}`. What was noticed on the way ({warnings}) stands in
`mcsharp_report.json`; `mcsharp_report.html` shows the run in pictures. The recipe:

```yaml
{recipe}
```
"""


_INPUTS = {"AutoModelForCausalLM": "tokenizer", "AutoModelForImageTextToText": "processor"}
"""Auto class of a model -> what makes its inputs."""

_SIZE = """Made from `{name}` by mcsharp_sdk {version}: {before:.1f} MB became {after:.1f} MB
({ratio:.1f} times smaller). Quantised weights have {nominal:.2f} bits on average, {stored:.2f} as
stored with scales and zero points."""

_SAME_SIZE = """Made from `{name}` by mcsharp_sdk {version}. The weights are as they were,
{after:.1f} MB."""

_PRUNING = """
When it runs, each token is computed by fewer experts: on the calibration text,
{kept}.
`model.set_expert_pruning("off")` turns that off, `model.set_expert_pruning("{mode}")` on again."""

_KEPT = {
    "TokenProtection": "TokenProtection's rule keeps {share:.1%} of those chosen by the router",
    "TopAnyRouter": "TopAnyRouter's networks keep {share:.1%}",
}
"""Stage -> what is said of the share of experts that it keeps."""


def model_card(name: str, report: Mapping[str, Any], recipe: str, model_class: str) -> str:
    """Markdown text from the run's report.

    Parameters
    ----------
    name : of the original model.
    report : content of ``mcsharp_report.json``.
    recipe : as run.
    model_class : the Auto class of transformers that loads it.
    """
    count = len(report["warnings"])
    return _CARD.format(
        name=name,
        model_class=model_class,
        inputs=_INPUTS[model_class],
        input_class=f"Auto{_INPUTS[model_class].title()}",
        summary=_summary(name, report),
        warnings=f"{count} warning{'' if count == 1 else 's'}",
        recipe=recipe.strip(),
    )


def _summary(name: str, report: Mapping[str, Any]) -> str:
    before, after = report["bytes_before"], report["bytes_after"]
    told = (_SIZE if "nominal_bits" in report else _SAME_SIZE).format(
        name=name,
        version=report["sdk_version"],
        before=before / 1e6,
        after=after / 1e6,
        ratio=before / after,
        nominal=report.get("nominal_bits"),
        stored=report.get("stored_bits"),
    )
    if "pruning" not in report:
        return told
    stages = report["stages"]
    kept = [_KEPT[s].format(share=stages[s]["keep_ratio"]) for s in _KEPT if s in stages]
    return f"{told}\n{_PRUNING.format(kept=', '.join(kept), mode=report['pruning'])}"
