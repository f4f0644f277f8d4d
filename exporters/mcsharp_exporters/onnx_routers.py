"""Routers as ONNX files, one per MoE layer, with a manifest."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import onnx
from pydantic import BeforeValidator, Field

from mcsharp_exporters.base import Exporter, FolderName, off, with_long_names
from mcsharp_exporters.graph_names import INDICES, KEEP, WEIGHTS, DtypeName, PruningChoice
from mcsharp_exporters.graph_nodes import IR_VERSION, OPSET
from mcsharp_exporters.model_pruning import rules_of
from mcsharp_exporters.output_folder import check_free, folder_in_one_go, write_file
from mcsharp_exporters.pruning_graph import LayerPruning
from mcsharp_exporters.router_graph import inputs_of, router_graph
from mcsharp_exporters.router_manifest import FILE_PATTERN, RouterFile, RouterManifest, Shape
from mcsharp_exporters.router_pruning import (
    NEEDED_ARTIFACTS,
    NOT_IN_A_ROUTER,
    RouterPruning,
    pruning_of_run,
)
from mcsharp_sdk._version import __version__
from mcsharp_sdk.arguments import short_dtype
from mcsharp_sdk.artifacts import TOP_ANY_ROUTER
from mcsharp_sdk.errors import InputError, Problem
from mcsharp_sdk.folders import MANIFEST_FILE
from mcsharp_sdk.models.routing import Router
from mcsharp_sdk.runtime.pruning_layout import DROP_INSIGNIFICANT

if TYPE_CHECKING:
    from mcsharp_sdk.engine.context import RunContext
    from mcsharp_sdk.modifiers.base import Modifier


class OnnxRoutersExporter(Exporter):
    """Write every router as an ONNX graph, for serving systems that route outside of torch."""

    type: Literal["onnx_routers"] = "onnx_routers"
    dtype: Annotated[
        DtypeName,
        BeforeValidator(short_dtype),
        Field(
            description="Input and stored weights; the rest is computed in fp32.",
            json_schema_extra=with_long_names(DtypeName),
        ),
    ] = "fp32"
    folder: FolderName = "onnx_routers"
    pruning: Annotated[
        PruningChoice,
        BeforeValidator(off),
        Field(
            description="How the routers drop experts, if earlier stages made what that needs; "
            "default is the mode in which the model is loaded."
        ),
    ] = "default"

    reads_routing: ClassVar[bool] = True

    def needs(self) -> tuple[str, ...]:
        return NEEDED_ARTIFACTS[self.pruning]

    def check_stages(self, stages: Sequence[Modifier]) -> list[Problem]:
        """Whether the rule that the routers will carry is one that a router can know."""
        by_rule = self.pruning in ("rule", "both") or (
            self.pruning == "default" and not any(s.writes == TOP_ANY_ROUTER for s in stages)
        )
        drops_tokens = any(rule.metric == DROP_INSIGNIFICANT for rule in rules_of(stages))
        return [Problem("pruning", NOT_IN_A_ROUTER)] if by_rule and drops_tokens else []

    def run(self, context: RunContext, output: Path) -> None:
        """Write into ``output / folder``."""
        pruning = RouterPruning.choose(self.pruning, pruning_of_run(context))
        export_onnx_routers(context.routers(), output / self.folder, self.dtype, pruning)


def export_onnx_routers(
    routers: Iterable[Router],
    output: str | Path,
    dtype: DtypeName = "fp32",
    pruning: RouterPruning | None = None,
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write ``router_layer_00003.onnx`` and the like, and ``manifest.json``, all or nothing.

    Parameters
    ----------
    routers : at least one, each of another layer; read one by one.
    output : folder to make; an empty one is taken too.
    dtype : of the graphs' inputs and stored weights, see :func:`router_graph`.
    pruning : how the routers drop experts; None for not at all.
    overwrite : replace a folder that holds exported routers and nothing else.

    Returns
    -------
    dict
        The manifest as written.

    Raises
    ------
    InputError
        If ``output`` is taken, there are no routers, a layer comes twice, weights do not fit into
        ``dtype``, or the pruning does not fit the routers. Nothing is then left behind.
    """
    output = Path(output)
    pruning = pruning or RouterPruning()
    check_free(output, overwrite, _is_ours, "exported router")
    entries: dict[int, RouterFile] = {}
    with folder_in_one_go(output) as folder:
        for router in routers:
            if router.layer in entries:
                raise InputError(f"two routers of layer {router.layer} were given")
            layer_pruning = pruning.of_layer(router.layer)
            entries[router.layer] = _write_router(folder, router, dtype, layer_pruning)
        if not entries:
            raise InputError("the model has no router to export")
        manifest = RouterManifest(
            sdk_version=__version__,
            dtype=dtype,
            pruning=pruning.mode,
            opset=OPSET,
            ir_version=IR_VERSION,
            layers=[entries[layer] for layer in sorted(entries)],
        )
        write_file(folder / MANIFEST_FILE, manifest.model_dump_json(indent=2).encode() + b"\n")
    return manifest.model_dump()


def _write_router(
    folder: Path, router: Router, dtype: DtypeName, pruning: LayerPruning
) -> RouterFile:
    model = router_graph(router, dtype, pruning)
    onnx.checker.check_model(model, full_check=True)
    data = model.SerializeToString(deterministic=True)
    name = f"router_layer_{router.layer:05d}.onnx"
    write_file(folder / name, data)
    slots: Shape = ["tokens", router.top_k]
    return RouterFile(
        layer=router.layer,
        file=name,
        sha256=hashlib.sha256(data).hexdigest(),
        bytes=len(data),
        experts=router.experts,
        top_k=router.top_k,
        hidden_size=router.hidden_size,
        inputs=inputs_of(router, pruning),
        outputs={INDICES: slots, WEIGHTS: slots, KEEP: slots},
        settings=asdict(router.settings),
        thresholds=None if pruning.thresholds is None else list(pruning.thresholds),
        network_units=pruning.units,
    )


def _is_ours(name: str) -> bool:
    return name == MANIFEST_FILE or re.match(FILE_PATTERN, name) is not None
