"""Which linears to time: those of one decoder layer of a model, or plain K x N shapes.

A decoder is named by a preset, a config.json, a folder or a hub id. Presets restate published
configurations, so that no network is needed.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from masquant_cli.errors import EnvironmentProblem, RecipeError


@dataclass(frozen=True)
class Linear:
    """One fused linear, y [T, n] = x [T, k] @ W.T: `qkv`, `o`, `gate_up`, `down`, or "KxN"."""

    name: str
    k: int
    n: int

    @property
    def shape(self) -> str:
        return f"{self.k}x{self.n}"


@dataclass(frozen=True)
class Decoder:
    """The language model's part of a configuration; `config` is the whole of it."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    config: Mapping = field(repr=False)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The four sites of a decoder layer, q,k,v and gate,up each as one linear."""
        width = self.heads * self.head_dim
        return (
            Linear("qkv", self.hidden, width + 2 * self.kv_heads * self.head_dim),
            Linear("o", width, self.hidden),
            Linear("gate_up", self.hidden, 2 * self.intermediate),
            Linear("down", self.intermediate, self.hidden),
        )


def _text(hidden, intermediate, layers, heads, kv_heads, vocabulary, **rest) -> dict:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        **rest,
    }


_MROPE = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    "max_position_embeddings": 32768,
}
_7B = (3584, 18944, 28, 28, 4, 152064)
PRESETS: Mapping[str, Mapping] = {
    "qwen2.5-vl-7b": {"model_type": "qwen2_5_vl", "text_config": _text(*_7B, **_MROPE)},
    "qwen2.5-vl-3b": {
        "model_type": "qwen2_5_vl",
        "text_config": _text(2048, 11008, 36, 16, 2, 151936, **_MROPE),
        "tie_word_embeddings": True,
    },
    "qwen2.5-omni-7b": {"model_type": "qwen2_5_omni_thinker", "text_config": _text(*_7B, **_MROPE)},
    "qwen2-100m": {"model_type": "qwen2", **_text(1024, 2816, 8, 16, 4, 4096)},
}
# Shapes that issue reports of CPU speed are about: a 7B layer's widest, and a small decoder's.
CPU_SHAPES = ("3584x18944", "18944x3584", "1024x1536", "2816x1024", "1024x5632")


def decoder(name: str) -> Decoder:
    """A preset, a config.json, a folder that holds one, or a hub id. RecipeError if none fits."""
    config = PRESETS.get(name) or _read(name)
    text = config.get("thinker_config", config)
    text = text.get("text_config", text)
    try:
        hidden, heads = int(text["hidden_size"]), int(text["num_attention_heads"])
        return Decoder(
            name=name,
            hidden=hidden,
            intermediate=int(text["intermediate_size"]),
            heads=heads,
            kv_heads=int(text.get("num_key_value_heads") or heads),
            head_dim=int(text.get("head_dim") or hidden // heads),
            layers=int(text["num_hidden_layers"]),
            config=config,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise RecipeError(
            f"this configuration does not describe a decoder: {error!s}", where=name
        ) from None


def _read(name: str) -> Mapping:
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    try:
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
        if name.count("/") == 1 and not path.suffix:
            from huggingface_hub import hf_hub_download

            return json.loads(Path(hf_hub_download(name, "config.json")).read_text())
    except ImportError:
        raise EnvironmentProblem("huggingface_hub is needed for a hub id", where=name) from None
    except ValueError as error:
        raise RecipeError(f"not JSON: {error}", where=str(path)) from None
    raise RecipeError(
        "no such model", where=name,
        hint=f"a config.json, a hub id, or one of {', '.join(PRESETS)}",
    )  # fmt: skip


def linear(text: str) -> Linear:
    """ "3584x18944" -> 3584 inputs, 18944 outputs."""
    k, _, n = text.lower().partition("x")
    if not (k.isdigit() and n.isdigit() and int(k) and int(n)):
        raise RecipeError(
            f"{text!r} is no shape", where="--shape", hint="inputs x outputs: 3584x18944"
        )
    return Linear(text.lower(), int(k), int(n))
