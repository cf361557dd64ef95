"""Tensor names on disk against names in the loaded module; Transformers 5 renames between them.

A checkpoint says `model.layers.0...` where the module says `model.language_model.layers.0...`.
Exports keep the names of the original files, because other engines know only those. The
mapping comes from Transformers' own tables, so it follows them across releases.
"""

from collections.abc import Iterable, Mapping

from torch import nn

from masquant_cli.errors import RecipeError
from masquant_cli.models.experts import per_expert, pieces


def disk_names(model: nn.Module, disk_keys: Iterable[str]) -> dict[str, str]:
    """{module key: disk key} for the tensors of `model` found among `disk_keys`.

    Works on meta skeletons. Disk keys of parts that the class does not have (the talker of a
    full Omni checkpoint) are left out, and so are tensors that Transformers builds from several.
    Files that stack experts give the fused parameters' names, whose `pieces` the model has.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    transforms = get_model_conversion_mapping(model)
    state = model.state_dict()
    if unfused := pieces(model):
        transforms = per_expert(transforms)
        state |= dict.fromkeys((piece.whole for piece in unfused.values()), True)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    prefix = model.base_model_prefix
    found: dict[str, str] = {}
    for key in disk_keys:
        name, merged = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:  # the loader's own second guess
            name, merged = rename_source_key(key, [], [], prefix, state)
        if name in state and merged is None:
            found[name] = key
    return found


def new_disk_names(new_keys: Iterable[str], known: Mapping[str, str]) -> dict[str, str]:
    """{module key: disk key} for tensors that an export adds beside known ones.

    `known` is what `disk_names` returned for the float checkpoint. A new tensor takes the disk
    prefix of the block it lies in: with `...self_attn.q_proj.weight` known, both
    `...self_attn.q_proj.weight_packed` and `...self_attn.attn_in.smooth_inv` are found.
    Raises RecipeError when no tensor of the block is known.
    """
    blocks: dict[str, str] = {}
    for module_key, disk_key in known.items():
        ours, theirs = module_key.split("."), disk_key.split(".")
        while len(ours) > 1 and len(theirs) > 1 and ours[-1] == theirs[-1]:
            ours, theirs = ours[:-1], theirs[:-1]
            blocks[".".join(ours)] = ".".join(theirs)
    names = {}
    for key in new_keys:
        block = key
        while block and block not in blocks:
            block = block.rpartition(".")[0]
        if not block:
            raise RecipeError(
                f"no name on disk is known near {key!r}",
                hint="the checkpoint's files do not hold the layer this tensor belongs to",
            )
        names[key] = blocks[block] + key[len(block) :]
    return names
