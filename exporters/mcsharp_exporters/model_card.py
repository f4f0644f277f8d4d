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

Made from `{name}` by mcsharp_sdk {version}: {before:.1f} MB became {after:.1f} MB
({ratio:.1f} times smaller). Quantised weights have {nominal:.2f} bits on average, {stored:.2f} as
stored with scales and zero points.

```python
import mcsharp_sdk  # lets transformers read this format
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

The licence is that of `{name}`. What was noticed on the way ({warnings}) stands in
`mcsharp_report.json`. The recipe:

```yaml
{recipe}
```
"""


def model_card(name: str, report: Mapping[str, Any], recipe: str) -> str:
    """Markdown text from the run's report.

    Parameters
    ----------
    name : of the original model.
    report : content of ``mcsharp_report.json``.
    recipe : as run.
    """
    before, after = report["bytes_before"], report["bytes_after"]
    count = len(report["warnings"])
    return _CARD.format(
        name=name,
        version=report["sdk_version"],
        before=before / 1e6,
        after=after / 1e6,
        ratio=before / after,
        nominal=report["nominal_bits"],
        stored=report["stored_bits"],
        warnings=f"{count} warning{'' if count == 1 else 's'}",
        recipe=recipe.strip(),
    )
