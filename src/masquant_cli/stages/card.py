"""The exported folder's README.md: what it is, how to load it, where it came from."""

from pathlib import Path
from string import Template

from masquant_cli import __version__
from masquant_cli.stages.job import Job

CARD = Template("""---
library_name: transformers
base_model: $model
tags: [masquant, quantized, multimodal]
---
# $name

`$model` at $bits, quantized by masquant $version with method `$method`.
The decoder's linears are low-bit; towers, embeddings and `lm_head` are untouched.

```python
import masquant_cli  # without it Transformers leaves the packed weights out, and answers noise
from transformers import AutoProcessor

model = masquant_cli.load_quantized("path/to/this/folder")
processor = AutoProcessor.from_pretrained("path/to/this/folder")
```

After `import masquant_cli`, `$architecture.from_pretrained(...)` works as well.

| | |
|---|---|
| weights | $weights |
| activations | $activations |
| modalities | $modalities (base: $base) |
| low-rank columns per site | $ranks |
| quantized linears | $quantized of $float in bf16 (x$ratio) |
| calibration tokens | $tokens |
| seed | $seed |
""")


def write_card(job: Job, folder: Path, sizes: dict[str, int]) -> None:
    recipe, scheme = job.recipe, job.scheme
    tokens = job.finished["calibrate"][1].summary["tokens"]
    activation = recipe.activations.bits
    group = recipe.weights.group_size
    text = CARD.substitute(
        name=recipe.name,
        model=recipe.model.path,
        version=__version__,
        method=recipe.method,
        bits=f"W{recipe.weights.bits}A{activation}",
        architecture=type(job.float.model).__name__,
        weights=f"int{recipe.weights.bits}, "
        + ("symmetric" if recipe.weights.symmetric else "asymmetric")
        + (f", groups of {group}" if group else ", one scale per output channel"),
        activations="float" if activation == 16 else f"int{activation}, per token, dynamic",
        modalities=", ".join(scheme.modalities),
        base=scheme.base_modality,
        ranks=", ".join(f"{kind} {scheme.rank(kind)}" for kind in scheme.sites),
        quantized=f"{sizes['quantized']:,} bytes",
        float=f"{sizes['float']:,}",
        ratio=f"{sizes['quantized'] / max(sizes['float'], 1):.3f}",
        tokens=", ".join(f"{m} {n:,}" for m, n in tokens.items()),
        seed=recipe.seed,
    )
    (folder / "README.md").write_text(text)
