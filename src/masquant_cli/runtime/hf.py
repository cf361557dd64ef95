"""Transformers integration: `from_pretrained` and `save_pretrained` for masquant checkpoints.

Importing this module registers it; `import masquant_cli` arranges for that to happen as soon as
Transformers is imported too.
"""

import json
from pathlib import Path

import torch
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from masquant_cli.errors import ArtifactError, EnvironmentProblem, MasquantError
from masquant_cli.models.experts import per_expert
from masquant_cli.models.families import FAMILIES, model_class
from masquant_cli.runtime.install import fuse_sites, install
from masquant_cli.runtime.pack import SUFFIXES, check_tensors
from masquant_cli.runtime.scheme import QUANT_METHOD, Scheme


class MasquantConfig(QuantizationConfigMixin):
    """The quantization_config of a checkpoint; its attributes are the keys of docs/format.md."""

    def __init__(self, **values):
        self.__dict__.update(Scheme.from_dict({"quant_method": QUANT_METHOD, **values}).to_dict())

    @property
    def scheme(self) -> Scheme:
        return Scheme.from_dict(self.to_dict())


class MasquantHfQuantizer(HfQuantizer):
    """Builds quantized modules on the meta model and refuses files that do not fill them."""

    requires_calibration = True  # quantizing on the fly is not what from_pretrained does

    def validate_environment(self, *args, **kwargs) -> None:
        if not self.pre_quantized:
            raise ArtifactError("this checkpoint is not quantized", hint="run `masquant run` first")

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        distributed = getattr(model.config, "distributed_config", None)
        if distributed is not None:
            raise EnvironmentProblem(
                "a masquant checkpoint cannot be loaded with tp_plan or distributed_config yet",
                hint="use device_map to spread it over several GPUs",
            )
        install(model, self.quantization_config.scheme)
        self._dtypes = {key: value.dtype for key, value in model.state_dict().items()}
        # Transformers would fill what a file lacks with random numbers and carry on.
        if checkpoint_files:
            check_files(model, [Path(file) for file in checkpoint_files])
        return model

    def _process_model_after_weight_loading(self, model, **kwargs):
        # Transformers 5.17 loads what it renames in the file's dtype, whatever dtype was asked
        # for, when the checkpoint is quantized.
        exempt = tuple(model._keep_in_fp32_modules or ()) + tuple(
            model._keep_in_fp32_modules_strict or ()
        )
        for key, value in model.state_dict(keep_vars=True).items():
            wanted = self._dtypes.get(key, value.dtype)
            if value.dtype != wanted and not any(name in key for name in exempt):
                value.data = value.data.to(wanted)
        # Or a call without no_grad would take the slow road that has gradients.
        model.requires_grad_(False)
        fuse_sites(model)
        return model

    def update_weight_conversions(self, weight_conversions, model=None):
        """Files of ours name every expert's tensors; nothing is to be stacked."""
        return per_expert(weight_conversions)

    def is_serializable(self, *args, **kwargs) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return False


def check_files(model, files: list[Path]) -> None:
    """Compare safetensors headers with the quantized modules of a meta model.

    Raises ArtifactError when a tensor of ours is missing, left over, or of another shape or dtype.
    """
    from masquant_cli.models.names import disk_names

    where = str(files[0].parent)
    headers: dict[str, tuple] = {}
    for file in files:
        headers.update(_header(file))
    names = disk_names(model, headers)
    ours = {key: disk for key, disk in names.items() if key.endswith(SUFFIXES)}
    expected = {
        key: (tuple(value.shape), _DTYPES[value.dtype])
        for key, value in model.state_dict().items()
        if key.endswith(SUFFIXES)
    }
    found = {key: headers[disk] for key, disk in ours.items()}
    stray = {k: headers[k] for k in headers.keys() - set(ours.values()) if k.endswith(SUFFIXES)}
    check_tensors(expected, found | stray, where)
    replaced = [key.removesuffix("_packed") for key in expected if key.endswith(".weight_packed")]
    biases = [key.removesuffix("weight") + "bias" for key in replaced]
    state = model.state_dict()
    missing = [key for key in biases if key in state and key not in names]
    if missing:
        raise ArtifactError(f"{missing[0]} is missing from the checkpoint", where=where)


_DTYPES = {torch.int8: "I8", torch.float32: "F32", torch.float16: "F16"}


def _header(file: Path) -> dict[str, tuple]:
    """{disk key: (shape, dtype)} from a safetensors file, without reading its tensors."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        size = max(
            (v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0
        )
        if file.stat().st_size != 8 + length + size:
            raise ValueError("its length does not match its header")
    except (OSError, ValueError, MemoryError, OverflowError) as error:
        raise ArtifactError(f"not a whole safetensors file: {error}", where=str(file)) from None
    return {
        key: (tuple(value["shape"]), value["dtype"])
        for key, value in header.items()
        if key != "__metadata__"
    }


def load_quantized(path, dtype: torch.dtype | str | None = None, **kwargs):
    """Load a folder that masquant exported. Returns the Transformers model, in eval mode.

    path: the folder (or a hub id). dtype: of the parts left unquantized, the checkpoint's own by
    default. Further keywords go to `from_pretrained` (device_map, ...). Raises ArtifactError when
    the folder is not there, not masquant's, or not complete.
    """
    config = _read_config(path, kwargs)
    family = FAMILIES.get(config.get("model_type"))
    if family is None:
        raise ArtifactError(
            f"model type {config.get('model_type')!r} is not known", where=str(path)
        )
    part = config.get(family.subconfig) if family.subconfig else config
    for place in (config, part or {}):
        if "quantization_config" in place:
            Scheme.from_dict(place["quantization_config"], where=f"{path}/config.json")
    if "quantization_config" not in (part or {}):
        raise ArtifactError(
            "this folder holds no masquant quantization_config",
            where=f"{path}/config.json",
            hint="point at a folder written by `masquant export`; float models load "
            "with from_pretrained",
        )
    try:
        model, info = model_class(family).from_pretrained(
            path, dtype=dtype or "auto", output_loading_info=True, **kwargs
        )
    except MasquantError:
        raise
    except OSError as error:
        raise ArtifactError(f"cannot be loaded: {error}", where=str(path)) from None
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ArtifactError(f"{missing[0]} is missing ({len(missing)} in all)", where=str(path))
    return model


def _read_config(path, kwargs: dict) -> dict:
    from transformers import PreTrainedConfig

    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise ArtifactError(
            "there is no config.json in this folder", where=str(path),
            hint="masquant run writes the checkpoint to RUN/export/model",
        )  # fmt: skip
    if not Path(path).exists() and Path(path).is_absolute():
        raise ArtifactError("no such checkpoint folder", where=str(path))
    hub = {k: kwargs[k] for k in ("revision", "token", "cache_dir", "subfolder") if k in kwargs}
    try:
        return PreTrainedConfig.get_config_dict(str(path), **hub)[0]
    except OSError as error:
        first = str(error).splitlines()[0]
        raise ArtifactError(f"no such checkpoint: {first}", where=str(path)) from None


# At the end: while this module is being imported, importing Transformers asks for it again.
if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(QUANT_METHOD)(MasquantConfig)
    register_quantizer(QUANT_METHOD)(MasquantHfQuantizer)
