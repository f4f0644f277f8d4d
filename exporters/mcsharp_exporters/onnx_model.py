"""Exporter ``onnx_model``: a whole model as one ONNX folder that stock onnxruntime runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import onnx
from pydantic import BeforeValidator, Field

from mcsharp_exporters.base import Exporter, FolderName, off, with_long_names
from mcsharp_exporters.external_data import ExternalData
from mcsharp_exporters.genai_config import GENAI_CONFIG, adapt_tokenizer, genai_config
from mcsharp_exporters.graph_names import AccuracyLevel, GraphPruning, Precision
from mcsharp_exporters.graph_nodes import IR_VERSION, OPSET
from mcsharp_exporters.model_graph import (
    cache_shape,
    check_family,
    check_group_size,
    family_problems,
    model_graph,
)
from mcsharp_exporters.model_nodes import ModelNodes
from mcsharp_exporters.model_pruning import choose_pruning, pruning_problems
from mcsharp_exporters.model_tensors import ModelTensors
from mcsharp_exporters.onnx_manifest import (
    DATA,
    GRAPH,
    FileEntry,
    ModelManifest,
    file_entry,
    is_exported_model,
    read_manifest,
)
from mcsharp_exporters.output_folder import (
    check_free,
    copy_files,
    folder_in_one_go,
    write_file,
)
from mcsharp_exporters.packed_product import BLOCK_SIZES
from mcsharp_exporters.router_pruning import NEEDED_ARTIFACTS
from mcsharp_sdk._version import __version__
from mcsharp_sdk.arguments import short_dtype
from mcsharp_sdk.artifacts import QUANTIZED_WEIGHTS
from mcsharp_sdk.errors import InputError, Problem
from mcsharp_sdk.folders import MANIFEST_FILE

if TYPE_CHECKING:
    from mcsharp_sdk.engine.context import RunContext
    from mcsharp_sdk.modifiers.base import Modifier

Track = Callable[[Iterable[int], str], Iterable[int]]

NO_EXPERTS = "all experts of decoder layer {} are removed: a graph needs one in each"


class OnnxModelExporter(Exporter):
    """Write the whole model as one ONNX folder that onnxruntime and onnxruntime-genai run."""

    type: Literal["onnx_model"] = "onnx_model"
    precision: Annotated[
        Precision,
        BeforeValidator(short_dtype),
        Field(
            description="Activations, scales, cache and logits; routers are fp32.",
            json_schema_extra=with_long_names(Precision),
        ),
    ] = "fp32"
    accuracy_level: Annotated[
        AccuracyLevel,
        Field(
            description="4: activations are rounded to 8 bits in products with packed weights, "
            "which is what makes them fast on a CPU. 0: they are not."
        ),
    ] = 4
    folder: FolderName = "onnx_model"
    pruning: Annotated[
        GraphPruning,
        BeforeValidator(off),
        Field(
            description="How experts are dropped; default is the mode in which the model is "
            "loaded, weights the rule of TokenProtection without protected tokens."
        ),
    ] = "default"

    reads_routing: ClassVar[bool] = True
    writes_weights: ClassVar[bool] = True

    def needs(self) -> tuple[str, ...]:
        return NEEDED_ARTIFACTS[self.pruning]

    def check_stages(self, stages: Sequence[Modifier]) -> list[Problem]:
        """Group sizes that onnxruntime lacks, and rules that a graph cannot know."""
        sizes = [
            getattr(stage, "group_size", None)
            for stage in stages
            if stage.writes == QUANTIZED_WEIGHTS
        ]
        known = ", ".join(map(str, BLOCK_SIZES))
        wrong = [
            Problem("", f"onnxruntime takes weights in groups of {known}, not of {size}")
            for size in sizes
            if size is not None and size not in BLOCK_SIZES
        ]
        return [*wrong, *pruning_problems(self.pruning, stages)]

    def check_model(self, config: Any) -> list[Problem]:
        return family_problems(config)

    def run(self, context: RunContext, output: Path) -> None:
        """Write into ``output / folder``."""
        source = ModelTensors.of_run(context)
        export_onnx_model(source, output / self.folder, self, track=context.track)


def export_onnx_model(
    source: ModelTensors,
    output: str | Path,
    settings: OnnxModelExporter | None = None,
    *,
    overwrite: bool = False,
    track: Track = lambda items, _: items,
) -> dict[str, Any]:
    """Write ``model.onnx`` with its data, and what runtimes need beside it, all or nothing.

    Memory is that of one decoder layer, and of the embeddings and the head.

    Parameters
    ----------
    source : the model.
    output : folder to make; an empty one is taken too.
    settings : the exporter with its settings; None for the default ones.
    overwrite : replace a folder that holds an exported model and nothing else.
    track : wraps the decoder layers, with a description, to show progress.

    Returns
    -------
    dict
        The manifest as written.

    Raises
    ------
    InputError
        If ``output`` is taken, or the model, its groups or its pruning cannot be a graph; before
        any weight is read. If weights do not fit into the precision, nothing is left behind.
    """
    settings, output = settings or OnnxModelExporter(), Path(output)
    check_family(source.config)
    if source.layout.packs:
        check_group_size(source.layout.group_size)
    for layer, bits in source.layout.experts.items():
        if not any(bits):
            raise InputError(f"{source.path}: {NO_EXPERTS.format(layer)}")
    pruning = choose_pruning(settings.pruning, source.pruning)
    earlier = _files_of(output)
    check_free(output, overwrite, lambda name: name in earlier, "file of an exported model")
    with folder_in_one_go(output) as folder:
        with ExternalData(folder / DATA) as data:
            graph = ModelNodes(data, settings.precision, settings.accuracy_level)
            model = model_graph(source, graph, pruning, track)
            weights = FileEntry(file=DATA, bytes=data.bytes, sha256=data.sha256())
        write_file(folder / GRAPH, model.SerializeToString(deterministic=True))
        onnx.checker.check_model(str(folder / GRAPH))
        copy_files(source.path, folder)
        adapt_tokenizer(folder)
        _write_json(folder / GENAI_CONFIG, genai_config(source.config, folder, GRAPH))
        others = [p for p in sorted(folder.iterdir()) if p.name != DATA]
        mode = "weights" if settings.pruning == "weights" else pruning.mode
        manifest = _manifest(source, graph, settings, mode, [*map(file_entry, others), weights])
        _write_json(folder / MANIFEST_FILE, manifest.model_dump())
    return manifest.model_dump()


def _files_of(output: Path) -> set[str]:
    """Names of the files of an earlier export; none if there is none."""
    if not is_exported_model(output):
        return set()
    return {MANIFEST_FILE, *(entry.file for entry in read_manifest(output).files)}


def _manifest(
    source: ModelTensors,
    graph: ModelNodes,
    settings: OnnxModelExporter,
    pruning: GraphPruning,
    files: list[FileEntry],
) -> ModelManifest:
    config, cache = source.config, cache_shape(source.config)
    return ModelManifest(
        sdk_version=__version__,
        model_type=config.model_type,
        precision=settings.precision,
        accuracy_level=settings.accuracy_level,
        pruning=pruning,
        compressed=source.layout.packs,
        nominal_bits=graph.matrices.nominal_bits(),
        stored_bits=graph.matrices.stored_bits(),
        parameters=sum(p.numel() for p in source.model.parameters()),
        layers=source.topology.num_layers,
        cache_heads=cache.heads,
        head_size=cache.head_size,
        vocabulary=config.vocab_size,
        context_length=config.max_position_embeddings,
        opset=OPSET,
        ir_version=IR_VERSION,
        files=files,
    )


def _write_json(path: Path, content: Any) -> None:
    write_file(path, json.dumps(content, indent=2).encode() + b"\n")
