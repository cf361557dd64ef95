"""The quantization_config of an exported folder, validated. docs/format.md explains every field.

Needs neither torch nor transformers; `hf.py` wraps it for Transformers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from masquant_cli.errors import ArtifactError
from masquant_cli.models.families import KINDS

QUANT_METHOD = "masquant"
FORMAT_VERSION = 1
PACK_BLOCK = 128  # masquant_kernels.PACK_BLOCK, restated: this module must not import torch


@dataclass(frozen=True)
class Scheme:
    """How the quantized linears of one checkpoint are stored and run."""

    weight_bits: int = 4  # 4 | 8
    group_size: int | None = None  # None: one scale per output channel
    symmetric: bool = True
    activation_bits: int = 8  # 16: activations stay floats
    modalities: tuple[str, ...] = ("text",)  # order of every [M, ...] tensor; the first is the base
    token_ids: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # non-base modalities
    ranks: Mapping[str, int] = field(default_factory=dict)  # site kind -> columns of lr_a
    sites: tuple[str, ...] = KINDS  # kinds that are quantized, where a layer has them

    def __post_init__(self):
        _require(self.weight_bits in (4, 8), "weights.bits must be 4 or 8", self.weight_bits)
        _require(
            self.group_size is None or (_whole(self.group_size) and self.group_size > 0),
            "weights.group_size must be null or a positive integer",
            self.group_size,
        )
        _require(
            self.symmetric is True or (self.symmetric is False and self.weight_bits == 4),
            "weights.symmetric must be true, or false at 4 bits",
            self.symmetric,
        )
        _require(
            self.activation_bits in (4, 6, 8, 16),
            "activations.bits must be 4, 6, 8 or 16",
            self.activation_bits,
        )
        _require(
            bool(self.modalities) and len(set(self.modalities)) == len(self.modalities),
            "modalities must be distinct and at least one",
            list(self.modalities),
        )
        for modality, ids in self.token_ids.items():
            _require(
                modality in self.modalities[1:] and len(ids) > 0 and all(map(_whole, ids)),
                "token_ids must list integer ids for non-base modalities",
                {modality: ids},
            )
        missing = set(self.modalities[1:]) - set(self.token_ids)
        _require(not missing, "token_ids lack a modality", sorted(missing))
        every = [t for ids in self.token_ids.values() for t in ids]
        _require(len(set(every)) == len(every), "a token id has two modalities", every)
        _require(
            bool(self.sites)
            and set(self.sites) <= set(KINDS)
            and len(set(self.sites)) == len(self.sites),
            f"sites must be distinct and among {', '.join(KINDS)}",
            list(self.sites),
        )
        for kind, rank in self.ranks.items():
            _require(
                kind in self.sites and _whole(rank) and rank >= 0,
                "ranks must give a whole number per quantized site kind",
                {kind: rank},
            )

    @property
    def base_modality(self) -> str:
        return self.modalities[0]

    def rank(self, kind: str) -> int:
        """Columns of lr_a for a site kind; 0 when it has no low-rank part."""
        return self.ranks.get(kind, 0) if len(self.modalities) > 1 else 0

    def groups(self, in_features: int) -> int:
        """Scales per output channel. Raises ArtifactError when the group size does not divide."""
        size = self.group_size or in_features
        if in_features % size:
            raise ArtifactError(f"group size {size} does not divide {in_features} inputs")
        return in_features // size

    def to_dict(self) -> dict:
        """The quantization_config of config.json; every field is always written."""
        packing = (
            {"layout": "nibble-block", "block": PACK_BLOCK}
            if self.weight_bits == 4
            else {"layout": "int8", "block": 1}
        )
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "weights": {
                "bits": self.weight_bits,
                "group_size": self.group_size,
                "symmetric": self.symmetric,
            },
            "activations": {"bits": self.activation_bits},
            "modalities": list(self.modalities),
            "base_modality": self.base_modality,
            "token_ids": {m: list(self.token_ids[m]) for m in self.modalities[1:]},
            "ranks": {kind: self.rank(kind) for kind in self.sites},
            "sites": list(self.sites),
            "packing": packing,
        }

    @classmethod
    def from_dict(cls, values: Mapping, *, where: str | None = "quantization_config") -> "Scheme":
        """Parse and validate a quantization_config.

        Raises ArtifactError for a newer format, for unknown or missing keys and bad values.
        """
        values = dict(values)
        version = values.get("format_version")
        if values.pop("quant_method", None) != QUANT_METHOD or not _whole(version):
            raise ArtifactError("not a masquant quantization_config", where=where)
        if version > FORMAT_VERSION:
            raise ArtifactError(
                f"format_version {version} is newer than {FORMAT_VERSION}, the newest known here",
                where=where,
                hint="upgrade masquant to load this checkpoint",
            )
        try:
            expected = cls().to_dict().keys() - {"quant_method"}
            _keys(values, expected, "quantization_config")
            _keys(values["weights"], {"bits", "group_size", "symmetric"}, "weights")
            _keys(values["activations"], {"bits"}, "activations")
            scheme = cls(
                weight_bits=values["weights"]["bits"],
                group_size=values["weights"]["group_size"],
                symmetric=values["weights"]["symmetric"],
                activation_bits=values["activations"]["bits"],
                modalities=tuple(values["modalities"]),
                token_ids={m: tuple(ids) for m, ids in values["token_ids"].items()},
                ranks=dict(values["ranks"]),
                sites=tuple(values["sites"]),
            )
            for key in ("base_modality", "packing"):
                _require(
                    values[key] == scheme.to_dict()[key],
                    f"{key} does not agree with the other fields",
                    values[key],
                )
        except ArtifactError as error:
            raise ArtifactError(error.message, where=where, hint=error.hint) from None
        except (TypeError, AttributeError, KeyError) as error:
            raise ArtifactError(f"malformed quantization_config: {error}", where=where) from None
        return scheme


def _whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _keys(values: Mapping, expected, what: str) -> None:
    unknown, missing = set(values) - set(expected), set(expected) - set(values)
    _require(not unknown, f"{what} has unknown keys", sorted(unknown))
    _require(not missing, f"{what} lacks keys", sorted(missing))


def _require(condition: bool, message: str, found) -> None:
    if not condition:
        raise ArtifactError(f"{message}, found {found!r}")
