"""mcsharp inspect: what a model folder holds."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal

from mcsharp_sdk.cli.options import JsonOption, path
from mcsharp_sdk.cli.output import print_json, print_note, print_table, print_text
from mcsharp_sdk.errors import InputError
from mcsharp_sdk.folders import check_model_folder

if TYPE_CHECKING:
    from mcsharp_sdk.evaluation.inspection import Inspection
    from mcsharp_sdk.evaluation.verification import Verification
    from mcsharp_sdk.runtime.pruning_layout import PruningLayout, RulePruning


def inspect(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", parser=path, help="Folder of the model.")
    ],
    kernels: Annotated[
        bool,
        typer.Option(
            "--kernels", help="Show instead what multiplies by each matrix on this machine."
        ),
    ] = False,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="With --kernels: time them first, and keep on this machine which is fastest.",
        ),
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(help="With --kernels: cpu or cuda. Default: a GPU where there is one."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="With --kernels: of the activations. Default: as evaluate takes it."),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Also read every byte: checksums, shapes, and NaN or infinite weights."
        ),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Show layers, experts, router, bytes by role and bit widths; no weight is loaded."""
    if kernels and verify:
        raise InputError("--verify does not go with --kernels: leave one of them out")
    if not kernels and (measure or device or dtype):
        raise InputError("--measure, --device and --dtype go with --kernels")
    check_model_folder(directory)
    if kernels:
        _kernels(directory, device or "auto", dtype or "auto", measure, json)
        return

    from mcsharp_sdk.evaluation import inspection

    verified = _verified(directory) if verify else None
    found = inspection.inspect(directory)
    if json:
        more = {"verified": verified.to_json()} if verified else {}
        print_json({**found.to_json(), **more})
        return
    _show(found)
    if verified:
        _show_verification(verified)


def _verified(directory: Path) -> Verification:
    from mcsharp_sdk.evaluation.verification import verify

    return verify(directory)


def _show_verification(verified: Verification) -> None:
    from mcsharp_sdk.evaluation.verification import NO_CHECKSUMS

    files = f"{verified.checksums} files are as they were written" if verified.checksums else ""
    rows = [
        ("checksums", files or NO_CHECKSUMS),
        ("numbers", f"{verified.tensors} tensors, all finite"),
    ]
    if verified.compressed:
        rows.insert(1, ("shapes", "all tensors are what config.json says"))
    print_table("Verified", ["", ""], rows)


def _show(found: Inspection) -> None:
    cost = found.cost
    bits = f"{cost.bits.nominal:.3f} nominal, {cost.bits.stored:.3f} stored"
    facts = [
        ("architecture", found.model_type),
        ("decoder layers", f"{found.layers}, {len(found.experts_per_layer)} with experts"),
        ("experts", _experts(found)),
        ("router", _router(found)),
        ("parameters", f"{cost.parameters:,}"),
        ("weights on disk", decimal(cost.weight_bytes)),
        ("read per token", f"{decimal(round(cost.activated_bytes()))} if experts share equally"),
        ("bits per weight", bits if cost.compressed else f"{bits}; not compressed"),
        *_pruning(found.pruning),
        ("can be compressed", _verdict(found)),
    ]
    print_table(found.model, ["", ""], facts)
    total = sum(share.bytes for share in cost.roles.values()) or 1
    shares = sorted(cost.roles.items(), key=lambda item: -item[1].bytes)
    rows = [
        (role, f"{share.parameters:,}", decimal(share.bytes), f"{share.bytes / total:.1%}")
        for role, share in shares
    ]
    print_table("Weights by role", ["role", "parameters", "bytes", "share"], rows)
    if found.widths is not None:
        title = f"Bits per expert, groups of {cost.group_size}"
        widths = [(str(layer), " ".join(map(str, w))) for layer, w in found.widths.items()]
        print_table(title, ["layer", "bits"], widths)
        linears = [(name, str(w)) for name, w in (found.linear_widths or {}).items()]
        print_table("Other linear layers", ["layer", "bits"], linears)


def _kernels(directory: Path, device: str, dtype: str, measure: bool, json: bool) -> None:
    from mcsharp_sdk.evaluation.kernel_choice import LAYER_TOKENS, TOKENS, kernel_choices

    if measure:
        _measure(directory, device, dtype)
    found = kernel_choices(directory, device, dtype)
    if json:
        print_json(found)
        return
    columns = ["matrix", "number", "bits", "rows", "columns", "chosen", *_counts(TOKENS)]
    rows = [
        (m.matrix, m.count, m.bits, m.rows, m.columns, m.chosen, *m.kernels.values())
        for m in found.matrices
    ]
    print_table(f"Kernels on {found.hardware}, {found.dtype} activations", columns, rows)
    if found.layers:
        print_table(
            "Experts, all of a layer at once by triton",
            ["layers", "bits", "chosen", *_counts(LAYER_TOKENS)],
            [
                (each.layers, "/".join(map(str, each.widths)), each.chosen, *each.tilings.values())
                for each in found.layers
            ],
        )
    for reason, names in _by_reason(found.refusals).items():
        print_text(f"{', '.join(names)}: not used, since {reason}")


def _counts(tokens: Sequence[int]) -> list[str]:
    return [f"{n} tokens" for n in tokens]


def _measure(directory: Path, device: str, dtype: str) -> None:
    from mcsharp_sdk.engine.progress import ProgressBars
    from mcsharp_sdk.evaluation.kernel_measurement import measure_kernels

    with ProgressBars() as bars:
        file = measure_kernels(
            directory, device, dtype, lambda cases: bars.track(cases, "timing kernels")
        )
    print_note(f"kept in {file}")


def _by_reason(refusals: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, reason in refusals.items():
        found.setdefault(reason, []).append(name)
    return found


def _experts(found: Inspection) -> str:
    counts = sorted(set(found.experts_per_layer.values()))
    if not counts:
        return "none"
    if found.experts_by_name:
        return (
            f"{'/'.join(map(str, counts))} per layer by the names of tensors; the config has none"
        )
    return f"{'/'.join(map(str, counts))} per layer, {found.top_k} per token"


def _router(found: Inspection) -> str:
    router = found.router
    if router is None:
        return "not known" if found.experts_per_layer else "none"
    order = f"top-k, then {router.scoring}" if router.score_chosen_only else router.scoring
    details = {
        f"{router.kept_groups} of {router.groups} groups": router.groups > 1,
        "bias": router.logit_bias,
        "correction bias": router.correction_bias,
        "renormalised": router.renormalise,
        "weighs the experts' inputs": router.weighs_input,
    }
    kind = order if router.sparse_mixing is None else "SparseMixer"
    return ", ".join([kind, *(name for name, there in details.items() if there)])


def _pruning(layout: PruningLayout | None) -> list[tuple[str, str]]:
    if layout is None:
        return [("expert pruning", "none")]
    modes = ", ".join(layout.modes)
    rows = [("expert pruning", f"{layout.mode} when loaded; can be {modes}")]
    if rule := layout.rule:
        rows.append(("  rule", f"metric {rule.metric}, {_rule(rule)}, {_in(rule.thresholds)}"))
    if learned := layout.learned:
        rows.append(("  learned", f"networks of {learned.units} units, {_in(learned.layers)}"))
    return rows


def _rule(rule: RulePruning) -> str:
    from mcsharp_sdk.runtime.pruning_layout import DROP_INSIGNIFICANT, NO_METRIC

    if rule.metric == DROP_INSIGNIFICANT:
        return f"drops {rule.drop_ratio:.3g} of the tokens"
    thresholds = [t for of_layer in rule.thresholds.values() for t in of_layer]
    limits = f"{min(thresholds):.3g} to {max(thresholds):.3g}" if thresholds else "none"
    protects = "" if rule.metric == NO_METRIC else f"protects {rule.protect_ratio:.3g}, "
    return f"{protects}thresholds {limits}"


def _in(layers: Collection[int]) -> str:
    return f"{len(layers)} layer{'' if len(layers) == 1 else 's'}"


def _verdict(found: Inspection) -> str:
    if found.cost.compressed or found.pruning:
        return "it is already"
    return f"no: {found.unsupported}" if found.unsupported else "yes"
