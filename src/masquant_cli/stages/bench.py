"""End-to-end timing of a float model against its quantized one, on this machine, side by side.

Repeats alternate between the two models, so that a busy machine disturbs both alike, and the
medians are compared. The outputs are checked before anything is timed.
"""

import gc
import os
import platform
import statistics
import time
from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor, nn

from masquant_cli.data.inputs import encode, model_inputs, placeholders, special_ids, tokenizer_of
from masquant_cli.data.samples import Sample
from masquant_cli.errors import RecipeError
from masquant_cli.progress import NullProgress, Progress
from masquant_cli.recipe import Bench
from masquant_cli.stages.evaluate import greedy
from masquant_cli.stages.finite import finite_or_fail


def bench(
    float_model,
    model,
    processor,
    settings: Bench,
    *,
    sample: Sample | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict:
    """Prefill and decode times of both models in seconds, medians over `settings.repeats`.

    The prompt is `settings.prompt_tokens` seeded text tokens per row; with `sample` the row
    ends in that sample, media included. Ratios are float time over quantized time: above 1
    the quantized model is faster. `weight_bytes` is of the quantized linears without their
    biases: "ratio" is against the float model in its `float_dtype` here, "ratio_bf16" against
    bf16, as export counts. Raises CheckError when a logit is not finite.
    """
    progress = progress or NullProgress()
    progress.stage("bench", settings.repeats, "repeats")
    inputs = prompt(processor, settings, sample=sample, seed=seed)
    models = {"float": float_model, "quantized": model}
    with torch.no_grad():
        checked = _check(models, inputs)
        times: dict[str, dict[str, list[float]]] = {
            name: {"prefill": [], "decode": []} for name in models
        }
        for name in models:  # warm up: allocations, thread pools, compiled kernels
            _once(models[name], inputs, 1)
        for repeat in range(settings.repeats):
            # Swapped every time: whoever comes second finds warmer caches and a hotter chip.
            for name in list(models)[:: 1 if repeat % 2 == 0 else -1]:
                prefill, decode = _once(models[name], inputs, settings.new_tokens)
                times[name]["prefill"].append(prefill)
                times[name]["decode"].append(decode)
            progress.advance(1)
    rows, length = inputs["input_ids"].shape
    result = {
        "prompt_tokens": length,
        "new_tokens": settings.new_tokens,
        "batch_size": rows,
        "repeats": settings.repeats,
        **_machine(model, float_model),
        **checked,
        "weight_bytes": _weight_bytes(float_model, model),
    }
    work = {"prefill": rows * length, "decode": rows * settings.new_tokens}
    for phase, tokens in work.items():
        seconds = {name: statistics.median(times[name][phase]) for name in models}
        result[phase] = {
            name: {
                "seconds": seconds[name],
                "tokens_per_second": tokens / seconds[name],
                "all_seconds": times[name][phase],
            }
            for name in models
        }
        result[phase]["speedup"] = seconds["float"] / seconds["quantized"]
    result["verdict"] = [
        _verdict(phase, result[phase]["speedup"], times) for phase in ("prefill", "decode")
    ]
    return result


def prompt(
    processor, settings: Bench, *, sample: Sample | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """A batch of equal rows without padding: seeded text tokens, then the sample if given."""
    batch: dict[str, Tensor] = {"input_ids": torch.empty(settings.batch_size, 0, dtype=torch.int64)}
    if sample is not None:
        batch = encode(processor, [sample] * settings.batch_size, for_generation=True)
    missing = max(settings.prompt_tokens - batch["input_ids"].shape[1], 0)
    tokenizer = tokenizer_of(processor)
    special = special_ids(tokenizer) | set(placeholders(processor))
    words = torch.tensor([i for i in sorted(tokenizer.get_vocab().values()) if i not in special])
    if not len(words):
        raise RecipeError("the tokenizer has no ordinary tokens to build a prompt from")
    generator = torch.Generator().manual_seed(seed)
    drawn = words[torch.randint(len(words), (settings.batch_size, missing), generator=generator)]
    for name, tensor in list(batch.items()):
        if name.endswith("token_type_ids"):
            batch[name] = torch.cat([torch.zeros_like(drawn), tensor], 1)
    batch["input_ids"] = torch.cat([drawn, batch["input_ids"]], 1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    return batch


def _check(models: dict, inputs: dict[str, Tensor]) -> dict:
    """Finite logits of both models, and how often they agree on the next token."""
    picks = {}
    for name, model in models.items():
        logits = model(**model_inputs(model, inputs), use_cache=False).logits
        finite_or_fail(logits, f"the {name} model")
        picks[name] = logits.argmax(-1).cpu()
    agree = (picks["float"] == picks["quantized"]).float().mean()
    return {"argmax_agreement": float(agree)}


def _once(model, inputs: dict[str, Tensor], new_tokens: int) -> tuple[float, float]:
    """Seconds of one prefill, and of `new_tokens` greedy steps over its KV cache.

    Timed inside generate(), which every user calls: it looks at the logits once after the
    prompt and once after every step.
    """
    from transformers import LogitsProcessorList

    ticks: list[float] = []

    def tick(_ids: Tensor, scores: Tensor) -> Tensor:
        _wait(model.device)
        ticks.append(time.perf_counter())
        return scores

    batch = model_inputs(model, inputs)
    gc.collect()  # not in the middle of a measurement
    with greedy(model, stop=False):
        _wait(model.device)
        start = time.perf_counter()
        model.generate(
            **batch,
            do_sample=False,
            max_new_tokens=new_tokens + 1,
            logits_processor=LogitsProcessorList([tick]),
        )
    return ticks[0] - start, ticks[-1] - ticks[0]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _machine(model, float_model) -> dict:
    device = model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "device": device.type,
        "device_name": name or platform.machine(),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "float_dtype": str(float_model.dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }


def _weight_bytes(float_model, model) -> dict:
    """Bytes of the quantized linears and their sites, and of the same weights in float."""
    from masquant_cli.runtime.mas_linear import MasLinear, MasSite

    quantized = [
        (name, m) for name, m in model.named_modules() if isinstance(m, MasLinear | MasSite)
    ]
    names = [name for name, m in quantized if isinstance(m, MasLinear)]
    weights = [float_model.get_submodule(name).weight for name in names]
    before, bf16 = sum(w.nbytes for w in weights), sum(2 * w.numel() for w in weights)
    after = sum(_bytes(module) for _, module in quantized)
    return {
        "float": before,
        "quantized": after,
        "ratio": after / before if before else None,
        "float_dtype": str(weights[0].dtype).removeprefix("torch.") if weights else None,
        "bf16": bf16,
        "ratio_bf16": after / bf16 if bf16 else None,
    }


def _bytes(module: nn.Module) -> int:
    tensors: Iterator[tuple[str, Tensor]] = chain(
        module.named_parameters(recurse=False), module.named_buffers(recurse=False)
    )
    return sum(tensor.nbytes for name, tensor in tensors if name != "bias")


def _verdict(phase: str, speedup: float, times: dict) -> str:
    spread = max(
        (max(run[phase]) - min(run[phase])) / statistics.median(run[phase])
        for run in times.values()
    )
    noise = f" (runs of one model differ by {spread:.0%})" if spread > abs(speedup - 1) else ""
    if speedup >= 1:
        return f"{phase}: quantized is {speedup:.2f}x as fast as float{noise}"
    return f"{phase}: quantized is SLOWER than float, {1 / speedup:.2f}x the time{noise}"
