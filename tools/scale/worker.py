"""One timed job in a process of its own: prints one JSON line with seconds and peak memory.

    python tools/scale/worker.py JOB '{"model": ..., ...}'

Imports are timed apart, for both tools; what is timed is reading the model, all work, saving.
"""

import json
import sys
import time
from pathlib import Path

BEGAN = time.perf_counter()


def peak_bytes() -> int:
    """VmHWM of this process: the most memory it ever held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("VmHWM:"))


def forward(model: str, dtype: str = "float32", batch: int = 16) -> dict:
    """The bare decoder over the calibration data, without its head, `batch` samples at a time."""
    import torch
    from transformers import AutoModel, AutoTokenizer, Qwen2Model  # noqa: F401

    imported = time.perf_counter()
    words = AutoTokenizer.from_pretrained(model)
    loaded = AutoModel.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
    ids = token_ids(model, words)
    ready = time.perf_counter()
    with torch.no_grad():
        for start in range(0, len(ids), batch):
            loaded(torch.tensor(ids[start : start + batch]), use_cache=False)
    done = time.perf_counter()
    return {"import_seconds": imported - BEGAN, "seconds": done - ready, "load": ready - imported}


def token_ids(model: str, words) -> list[list[int]]:
    """The calibration samples as both tools see them."""
    rows = [json.loads(x) for x in (Path(model) / "calibration.jsonl").read_text().splitlines()]
    chats = [[{"role": "user", "content": row["text"]}] for row in rows]
    texts = [words.apply_chat_template(chat, tokenize=False) for chat in chats]
    return [words(text, add_special_tokens=False)["input_ids"] for text in texts]


def masquant(recipe: str, run_dir: str, overrides: list[str] = (), until: str = "export") -> dict:
    """`masquant run` by its library function."""
    import datasets  # noqa: F401  (what follows: imported when first needed)
    import torch._dynamo  # noqa: F401
    from transformers import AutoProcessor, Qwen2ForCausalLM  # noqa: F401

    from masquant_cli import pipeline, recipe_yaml
    from masquant_cli.stages import job, stage_function  # noqa: F401

    for stage in ("calibrate", "smooth", "compensate", "export"):
        stage_function(stage)
    imported = time.perf_counter()
    loaded = recipe_yaml.load(recipe, list(overrides))
    done = pipeline.run(loaded, Path(run_dir), until=until)
    return {
        "import_seconds": imported - BEGAN,
        "seconds": time.perf_counter() - imported,
        "stages": {k: v["seconds"] for k, v in done["stages"].items()},
        "stage_peaks": {k: v["peak_bytes"] for k, v in done["stages"].items()},
    }


def llmcompressor(model: str, out: str, gptq: bool = False, samples: int | None = None) -> dict:
    """`oneshot` to W8A8 with SmoothQuant, and rounding to nearest or GPTQ; saved compressed."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM  # noqa: F401

    imported = time.perf_counter()
    words = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = token_ids(model, words)[:samples]
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(x) for x in ids]})
    rounding = GPTQModifier if gptq else QuantizationModifier
    oneshot(
        model=loaded,
        dataset=data,
        recipe=[
            SmoothQuantModifier(smoothing_strength=0.5),
            rounding(targets="Linear", scheme="W8A8", ignore=["lm_head"]),
        ],
        max_seq_length=len(ids[0]),
        num_calibration_samples=len(ids),
        output_dir=out,
    )
    return {"import_seconds": imported - BEGAN, "seconds": time.perf_counter() - imported}


JOBS = {f.__name__: f for f in (forward, masquant, llmcompressor)}

if __name__ == "__main__":
    found = JOBS[sys.argv[1]](**json.loads(sys.argv[2]))
    # Stages reset the kernel's mark, so as to know their own peaks.
    peak = max(peak_bytes(), *found.get("stage_peaks", {}).values(), 0)
    print(json.dumps({**found, "peak_bytes": peak}))
