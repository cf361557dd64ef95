"""`masquant inspect`: what is in a recipe, run, stage, shard, checkpoint or model."""

from typing import Annotated, Any

import typer

from masquant_cli.cli.common import Json

Document = dict[str, Any]
NAMES = {
    "quantized_linears": "quantized linears",
    "low_rank": "low rank",
    "other": "everything else",
    "files": "on disk",
    "file": "on disk",
}


def inspect(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH", help="A recipe, run, stage, shard, exported folder or float model."
        ),
    ],
    json: Json = False,
) -> None:
    """Say what is in a file or folder; nothing is loaded or changed."""
    from masquant_cli.cli import render
    from masquant_cli.inspect import inspect as look

    render.output(look(path), json, table)


def table(document: Document) -> None:
    {
        "recipe": _recipe,
        "run": _run,
        "stage": _stage,
        "shard": _shard,
        "checkpoint": _folder,
        "model": _folder,
    }[document["kind"]](document)


def _recipe(document: Document) -> None:
    model = document["model"]
    _facts(
        ("recipe", f"{document['name']} ({document['path']})"),
        ("model", model["path"] + ("" if model["files"] else " (not on this machine)")),
        *_decided(document),
    )
    if model["files"]:
        print()
        _sites(model["files"])


def _run(document: Document) -> None:
    from masquant_cli.cli import render
    from masquant_cli.cli.console import clock_face

    origin = document["provenance"]
    _facts(
        ("run", f"{document['name'] or 'no recipe.json'} ({document['path']})"),
        ("model", origin["model"] or ""),
        *(_decided(document) if document["recipe"] else ()),
        ("made with", _versions(origin["versions"])),
        ("on disk", render.size(document["bytes_on_disk"])),
    )
    print()
    rows = [
        (
            name,
            s["state"],
            "" if s["seconds"] is None else clock_face(s["seconds"]),
            render.size(s["peak_bytes"]) if s["peak_bytes"] else "",
            render.size(s["bytes"]) if s["bytes"] else "",
            (s["fingerprint"] or "")[:12],
            s["why"] or _brief(s["summary"]),
        )
        for name, s in document["stages"].items()
    ]
    heads = ("stage", "state", "time", "peak memory", "on disk", "fingerprint", "")
    render.draw_table(heads, rows, right=(2, 3, 4))
    if document["checkpoint"]:
        print()
        _folder(document["checkpoint"])
    if document["evaluation"]:
        print()
        render.evaluation({"tasks": document["evaluation"]["tasks"]})


def _stage(document: Document) -> None:
    from masquant_cli.cli import render
    from masquant_cli.cli.console import clock_face

    _facts(
        ("stage", f"{document['stage']} ({document['path']})"),
        ("state", " ".join(filter(None, (document["state"], document["why"])))),
        ("time", clock_face(document["seconds"])),
        ("peak memory", render.size(document["peak_bytes"])),
        ("found", _brief(document["summary"])),
        ("fingerprint", document["fingerprint"]),
        ("seed", str(document["seed"])),
        ("made with", _versions(document["versions"])),
    )
    print()
    rows = [(f["name"], render.size(f["bytes"] or 0), f["sha256"][:12]) for f in document["files"]]
    render.draw_table(("file", "size", "sha256"), rows, right=(1,))


def _shard(document: Document) -> None:
    from masquant_cli.cli import render

    facts = [("shard", document["path"])]
    if document["of"] == "stage":
        said = {True: "finished", False: "not vouched for by a finished stage", None: ""}
        facts += [
            ("stage", f"{document['stage'] or '?'} {said[document['finished']]}"),
            ("layer", "" if document["layer"] is None else str(document["layer"])),
            ("modalities", ", ".join(document["modalities"])),
            ("tokens", _brief(document["tokens"])),
            ("an expert's", _brief(document.get("experts", {}))),
            ("ranks", _brief(document["ranks"])),
            ("fingerprint", document["fingerprint"]),
        ]
    sizes = document["bytes"]
    facts += [(NAMES.get(name, name), render.size(size)) for name, size in sizes.items()]
    _facts(*facts)
    print()
    rows = [
        (t["name"], t["dtype"], " x ".join(map(str, t["shape"])), render.size(t["bytes"]))
        for t in document["tensors"]
    ]
    render.draw_table(("tensor", "dtype", "shape", "size"), rows, right=(3,))


def _folder(document: Document) -> None:
    from masquant_cli.cli import render

    ours = document["kind"] == "checkpoint"
    family = document["model_type"] or "?"
    if not document["supported"]:
        family += " (not a family that masquant knows)"
    facts = [("checkpoint" if ours else "float model", document["path"]), ("family", family)]
    if ours:
        origin, bits = document["provenance"], document["bits_per_weight"]
        facts += [
            ("bits", _bits(document)),
            ("modalities", _modalities(document)),
            ("bits per weight", f"{bits['without_low_rank']:.3f}"
             f", {bits['with_low_rank']:.3f} with low rank"),
        ]  # fmt: skip
        if origin:
            facts += [
                ("made from", f"{origin['model']} by {origin['recipe']}, seed {origin['seed']}")
            ]
    elif document["quantized_by"]:
        facts += [("quantized by", document["quantized_by"])]
    sizes = document["bytes"]
    facts += [(NAMES.get(name, name), render.size(size)) for name, size in sizes.items()]
    kinds = (f"{d} {render.size(v['bytes'])}" for d, v in document["dtypes"].items())
    _facts(*facts, ("dtypes", ", ".join(kinds)), ("shards", str(len(document["files"]))))
    print()
    _sites(document)


def _sites(document: Document) -> None:
    """One row per site kind, over all layers."""
    from masquant_cli.cli import render

    ranks = document.get("ranks")
    rows = [
        (
            kind,
            ", ".join(site["linears"])
            + (f" of {site['experts']} experts" if "experts" in site else ""),
            f"{site['in']} -> {', '.join(map(str, site['out']))}",
            f"{site['weights']:,}",
            *((str(ranks[kind]),) if ranks else ()),
            render.size(site["bytes"]),
            *((render.size(site["low_rank_bytes"]),) if ranks else ()),
        )
        for kind, site in document["sites"].items()
    ]
    if not rows:
        print("no linear that masquant would quantize was found")
        return
    heads = ("site", "linears", "in -> out", "weights", *(("rank",) if ranks else ()), "size")
    heads += ("low rank",) if ranks else ()
    render.draw_table(heads, rows, right=tuple(range(3, len(heads))))
    linears, weights = document["linears"], document["weights_in_linears"]
    print(f"{document['layers']} layers, {linears} linears, {weights:,} weights in them")


def _decided(document: Document) -> list[tuple[str, str]]:
    wanted = document["compensation"]
    corrected = f"rank {wanted['rank']:g} in {', '.join(wanted['sites'])}"
    return [
        ("method", document["method"]),
        ("bits", _bits(document)),
        ("rounding", document["weights"]["rounding"]),
        ("modalities", _modalities(document)),
        ("correction", corrected if wanted["rank"] else "none"),
        ("calibrated on", ", ".join(document["sources"])),
        ("tasks", ", ".join(document["tasks"])),
        ("seed", str(document["seed"])),
    ]


def _bits(document: Document) -> str:
    weights = document["weights"]
    group = weights["group_size"]
    scales = f"groups of {group}" if group else "one scale per output channel"
    return f"{document['bits']}, {'' if weights['symmetric'] else 'a'}symmetric, {scales}"


def _modalities(document: Document) -> str:
    return ", ".join(document["modalities"]) + f" (base: {document['base_modality']})"


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _brief(summary: dict[str, Any]) -> str:
    """Numbers of a flat mapping, and of the mappings in it, in one line."""
    said = []
    for key, value in summary.items():
        if isinstance(value, dict):
            said.append(f"{key.replace('_', ' ')}: {_brief(value)}")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            shown = f"{value:,}" if isinstance(value, int) else f"{value:g}"
            said.append(f"{key if '.' in key else key.replace('_', ' ')} {shown}")
    return ", ".join(said)


def _facts(*facts: tuple[str, str]) -> None:
    from masquant_cli.cli import render

    render.draw_table(("", ""), [fact for fact in facts if fact[1]], heads=False)
