"""A whole language model with random weights: the columns of the paper's Table 7.

The model comes from its real Transformers class and configuration, without vision or audio
towers (they are not quantized); an ordinary token stands in for image tokens, so that any share
of vision tokens can be had. Float and quantized models are timed in turn. Decode steps are of
text tokens, as generated ones are.
"""

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from masquant_kernels import dispatch
from torch import Tensor, nn

from masquant_cli.algo.low_rank import rank_for
from masquant_cli.bench import gate
from masquant_cli.bench.peers import say
from masquant_cli.bench.shapes import Decoder
from masquant_cli.bench.timing import Clock
from masquant_cli.errors import RecipeError
from masquant_cli.models.families import family_of
from masquant_cli.models.sites import layers_path
from masquant_cli.progress import Progress
from masquant_cli.runtime.install import install
from masquant_cli.runtime.scheme import KINDS, Scheme

CHECK_TOKENS = 48
TOWERS = ("visual", "audio_tower")
# Of the logits, fast backends against the reference. One integer moved by a rounding moves others
# in every layer after it, so two right ways part by some percent; wrong wiring parts by about 100.
LOGITS = {torch.float32: 0.1, torch.bfloat16: 0.25, torch.float16: 0.25}


@dataclass(frozen=True)
class Settings:
    decoder: Decoder
    batches: Sequence[int] = (1, 8)
    sequence: int = 2048
    steps: int = 32  # decode steps after the prompt
    ratios: Sequence[float] = (0.0, 0.01, 0.02, 0.05)
    vision: Sequence[float] = (0.0, 0.5, 1.0)
    bits: Sequence[int] = (4, 8)  # 8 only without low rank
    float_dtypes: Sequence[torch.dtype] = (torch.bfloat16,)
    dtype: torch.dtype = torch.bfloat16  # of the quantized model's activations
    layers: int | None = None  # fewer than the configuration has
    seed: int = 0


def rows(settings: Settings, clock: Clock, progress: Progress) -> Iterator[list[dict]]:
    """Per quantized form, batch and vision share: the float rows beside it and its own."""
    forms = [(4, ratio) for ratio in settings.ratios if 4 in settings.bits]
    forms += [(8, 0.0)] if 8 in settings.bits else []
    progress.stage(
        "model", len(forms) * len(settings.batches) * len(settings.vision), "measurements"
    )
    floats = {f"dense {say(d)}": build(settings, clock.device, d) for d in settings.float_dtypes}
    for bits, ratio in forms:
        model = build(settings, clock.device, settings.dtype, bits, ratio)
        check = _check(model, settings, clock.device)
        name = f"W{bits}A8"
        labels = {"bits": bits, "rank_ratio": ratio, "check": check.as_dict()}
        for batch in settings.batches:
            for share in settings.vision:
                place = {"batch": batch, "tokens": settings.sequence, "vision": share}
                place |= {"shape": f"batch {batch}, {share:.0%} vision"}
                if not check.ok:
                    yield [{"name": name, **place, **labels}]
                    continue
                ids = prompt(settings, batch, share, clock.device)
                found = measure({**floats, name: model}, ids, settings, clock)
                found[name] |= labels
                yield [{"name": key, **place, **row} for key, row in found.items()]
                progress.advance(1, tokens=batch * settings.sequence)
        del model


@torch.no_grad()
def build(
    settings: Settings, device, dtype: torch.dtype, bits: int | None = None, ratio: float = 0.0
) -> nn.Module:
    """The decoder of a configuration on `device`, random; quantized when `bits` is given."""
    config, model_class = _config(settings)
    with torch.device("meta"):
        model = model_class(config).to(dtype).eval()
    for module in list(model.modules()):
        for tower in TOWERS:
            if hasattr(module, tower):
                setattr(module, tower, nn.Identity())
    if bits is not None:
        install(model, scheme(settings, bits, ratio))
    model = model.to_empty(device=device)
    for name, module in list(model.named_modules()):
        if "inv_freq" in module._buffers:  # computed, not loaded: made again on the device
            with torch.device(device):
                model.set_submodule(name, type(module)(config=module.config))
    model.tie_weights()
    _fill(model, torch.Generator(device).manual_seed(settings.seed))
    return model


def _config(settings: Settings):
    import transformers
    from transformers import CONFIG_MAPPING

    values = dict(settings.decoder.config)
    kind = values.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise RecipeError(f"Transformers knows no model type {kind!r}", where=settings.decoder.name)
    values.pop("quantization_config", None)
    config = CONFIG_MAPPING[kind].from_dict(values)
    family = family_of(config, where=settings.decoder.name)
    config = getattr(config, family.subconfig) if family.subconfig else config
    text = config.get_text_config()
    text.num_hidden_layers = settings.layers or text.num_hidden_layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: text.num_hidden_layers]
    return config, getattr(transformers, family.model_class)


def scheme(settings: Settings, bits: int, ratio: float):
    """Text and vision; the last id of the vocabulary stands for an image token."""
    ranks = {
        kind: rank_for(ratio, linear.k, linear.n) if ratio else 0
        for kind, linear in zip(KINDS, settings.decoder.linears, strict=True)
    }
    token = _vocabulary(settings) - 1
    return Scheme(
        weight_bits=bits, modalities=("text", "vision"), token_ids={"vision": (token,)}, ranks=ranks
    )


def _vocabulary(settings: Settings) -> int:
    return _config(settings)[0].get_text_config().vocab_size


def _fill(model: nn.Module, generator: torch.Generator) -> None:
    """Random values at which activations neither vanish nor explode."""
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            end, tensor = name.rpartition(".")[2], tensor.data
            if end == "weight_packed":
                tensor.random_(-127, 128, generator=generator)
            elif end == "weight_scale":
                four = model.get_submodule(name.rpartition(".")[0]).weight_bits == 4
                width = model.get_submodule(name.rpartition(".")[0]).in_features
                tensor.fill_(width**-0.5 / (4.6 if four else 73))  # of uniform integers' rms
            elif end == "smooth_inv":
                tensor.uniform_(0.7, 1.4, generator=generator)
            elif end in ("lr_a", "lr_b"):
                tensor.normal_(0, 0.1 * tensor.shape[1] ** -0.5, generator=generator)
            elif end == "bias":
                tensor.zero_()
            elif tensor.ndim == 1:
                tensor.fill_(1)
            else:
                tensor.normal_(0, tensor.shape[-1] ** -0.5, generator=generator)


def prompt(settings: Settings, batch: int, share: float, device, tokens: int | None = None):
    """Seeded ordinary tokens with one span of vision tokens in the middle, int64 [batch, S]."""
    count, last = tokens or settings.sequence, _vocabulary(settings) - 1
    generator = torch.Generator().manual_seed(settings.seed)
    # The upper half may hold a family's own placeholders.
    ids = torch.randint(1, last // 2, (batch, count), generator=generator)
    seen = round(count * share)
    start = (count - seen) // 2
    ids[:, start : start + seen] = last
    return ids.to(device)


@torch.no_grad()
def _check(model: nn.Module, settings: Settings, device) -> gate.Check:
    """Logits of a short prompt, half of it vision, through the fast kernels and the reference."""
    ids = prompt(settings, 1, 0.5, device, min(CHECK_TOKENS, settings.sequence))
    found = model(input_ids=ids, use_cache=False).logits
    with dispatch.force("reference"):
        want = model(input_ids=ids, use_cache=False).logits
    if not torch.isfinite(want).all():
        return gate.Check(False, float("inf"), float("inf"), "logits that are not finite")
    return gate.floats(found, want, LOGITS[settings.dtype])


@torch.no_grad()
def measure(
    models: Mapping[str, nn.Module], ids: Tensor, settings: Settings, clock: Clock
) -> dict[str, dict]:
    """Prefill seconds, decode seconds per step, and bytes of every model, medians, interleaved."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    peaks = {name: _peak(models[name], ids, settings, clock) for name in models}  # warms up too
    for repeat in range(clock.repeats):
        for name in list(models)[:: 1 if repeat % 2 == 0 else -1]:
            taken[name].append(_once(models[name], ids, settings.steps, clock))
    found = {}
    for name, pairs in taken.items():
        prefill, decode = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
        weights = resident(models[name])
        layers = resident(models[name].get_submodule(layers_path(models[name])))
        found[name] = {
            "prefill_seconds": prefill,
            "decode_seconds": decode,
            "weight_bytes": weights,
            "layers_bytes": layers,
            "layers_ratio_float32": layers / (4 * _linear_weights(settings)),
            "memory_bytes": weights + peaks[name],
            "check": {"ok": True},
        }
    dense = [row for name, row in found.items() if name.startswith("dense")]
    fastest = min(dense, key=lambda row: row["prefill_seconds"])
    for row in found.values():
        for phase in ("prefill", "decode"):
            key = f"{phase}_seconds"
            row[f"{phase}_speedup"] = min(d[key] for d in dense) / row[key]
        row["memory_saving"] = fastest["memory_bytes"] / row["memory_bytes"]
    return found


def _linear_weights(settings: Settings) -> int:
    layers = settings.layers or settings.decoder.layers
    return layers * sum(linear.k * linear.n for linear in settings.decoder.linears)


def _once(model: nn.Module, ids: Tensor, steps: int, clock: Clock) -> tuple[float, float]:
    clock.wait()
    start = time.perf_counter()
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    clock.wait()
    filled = time.perf_counter()
    token = torch.ones_like(ids[:, :1])
    for _ in range(steps):
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
    clock.wait()
    return filled - start, (time.perf_counter() - filled) / max(steps, 1)


def _peak(model: nn.Module, ids: Tensor, settings: Settings, clock: Clock) -> int:
    """Bytes beyond the weights: the most a pass took on a GPU, the KV cache alone on a CPU."""
    if clock.device.type != "cuda":
        _once(model, ids, 1, clock)
        decoder = settings.decoder
        layers = settings.layers or decoder.layers
        width = decoder.kv_heads * decoder.head_dim * model.dtype.itemsize
        return 2 * layers * width * ids.shape[0] * (ids.shape[1] + settings.steps)
    _once(model, ids, 1, clock)
    before = torch.cuda.memory_allocated(clock.device)
    torch.cuda.reset_peak_memory_stats(clock.device)
    _once(model, ids, settings.steps, clock)
    return torch.cuda.max_memory_allocated(clock.device) - before


def resident(model: nn.Module) -> int:
    """Bytes of all parameters and buffers; what shares storage counts once."""
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def verdicts(found: Sequence[Mapping]) -> list[str]:
    """In words, prefill and decode of every quantized row."""
    said = []
    for row in found:
        if row["name"].startswith("dense") or "prefill_seconds" not in row:
            continue
        parts = [_phase(phase, row[f"{phase}_speedup"]) for phase in ("prefill", "decode")]
        name = f"{row['name']} rank {row['rank_ratio']:g}"
        said.append(f"{name}, {row['shape']}: {', '.join(parts)}")
    return said


def _phase(phase: str, speedup: float) -> str:
    if speedup >= 1:
        return f"{phase} {speedup:.2f}x as fast as dense float"
    return f"{phase} SLOWER than dense float, {1 / speedup:.2f}x the time"
