"""How far a quantized model strays from its float one, per modality, on the tasks' own samples.

Accuracy saturates and hides damage; these numbers do not. Answers are teacher-forced, so both
models always read the same tokens.
"""

import contextlib
import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from masquant_cli.algo import metrics
from masquant_cli.data.chat import MEDIA, modality_of
from masquant_cli.data.inputs import encode_scored, model_inputs, with_answer
from masquant_cli.data.samples import Sample
from masquant_cli.errors import CheckError
from masquant_cli.models.modality import modality_ids
from masquant_cli.progress import NullProgress, Progress
from masquant_cli.recipe import Evaluation, Modality
from masquant_cli.stages import scoring
from masquant_cli.stages.finite import finite_or_fail
from masquant_cli.stages.prepare import reference, task_samples


def fidelity(
    float_model,
    model,
    processor,
    evaluation: Evaluation,
    *,
    modalities: tuple[Modality, ...],
    seed: int,
    progress: Progress | None = None,
) -> dict:
    """{"sqnr_db", "sqnr_end_db", "kl", "flip_rate"}, each {modality: number, or None without
    such tokens}, "sqnr_db_by_linear": {linear: {modality: dB}} and "fidelity_n": {modality:
    samples}.

    - sqnr_db: mean over the quantized linears of 10 log10(sum y^2 / sum (y - y_q)^2) over the
      modality's tokens; y is the float linear's output in the float model and y_q the
      quantized linear's for the same input. sqnr_db_by_linear: before that mean.
    - sqnr_end_db: the same of the last hidden states (the input of lm_head), end to end.
    - kl: mean KL(float || quantized) in nats at the positions that predict answer tokens;
      flip_rate: the share of them whose most likely token changed. A sample counts under
      every modality its prompt holds, and under text if it holds text alone.

    Padding is left out. Raises CheckError for logits that are not finite and for models that
    do not belong together.
    """
    progress = progress or NullProgress()
    samples = draw(evaluation, modalities=modalities, seed=seed)
    progress.stage("fidelity", len(samples), "samples")
    linears = _pairs(float_model, model)
    theirs = _their_index(model, modalities)
    local = {name: torch.zeros(len(modalities), 2, dtype=torch.float64) for name in linears}
    end = torch.zeros(len(modalities), 2, dtype=torch.float64)
    groups: dict[str, list[Tensor]] = {m: [] for m in modalities}
    members = dict.fromkeys(modalities, 0)
    for start in range(0, len(samples), evaluation.batch_size):
        chosen = samples[start : start + evaluation.batch_size]
        batch, scored = encode_scored(processor, chosen)
        ids = modality_ids(batch["input_ids"], model.config, modalities)
        with (
            torch.no_grad(),
            _compared(model, linears, ids, theirs, batch["attention_mask"], local),
        ):
            hidden, logits = _forward(float_model, batch)
        finite_or_fail(logits, "the float model")
        with torch.no_grad():
            hidden_q, logits_q = _forward(model, batch)
        finite_or_fail(logits_q, "the quantized model")
        end += _energies(hidden, hidden_q, ids, batch["attention_mask"], len(modalities))
        for row, sample in enumerate(chosen):
            at = scored[row, 1:].nonzero().flatten().to(logits.device)
            pair = logits[row, at], logits_q[row, at.to(logits_q.device)].to(logits.device)
            found = torch.stack([metrics.kl_nats(*pair), metrics.flips(*pair).float()], 1).cpu()
            for name in _groups(sample, modalities):
                groups[name].append(found)
                members[name] += 1
        progress.advance(len(chosen), tokens=2 * int(batch["attention_mask"].sum()))
    means = {m: torch.cat(rows).double().mean(0) for m, rows in groups.items() if rows}
    return {
        "sqnr_db": _mean_db(local, modalities),
        "sqnr_db_by_linear": {n: _mean_db({n: pair}, modalities) for n, pair in local.items()},
        "sqnr_end_db": _mean_db({"": end}, modalities),
        "kl": {m: float(means[m][0]) if m in means else None for m in modalities},
        "flip_rate": {m: float(means[m][1]) if m in means else None for m in modalities},
        "fidelity_n": members,
    }


def draw(evaluation: Evaluation, *, modalities: tuple[Modality, ...], seed: int) -> list[Sample]:
    """`fidelity_samples` samples with their answers, from the tasks in turn."""
    per_task = []
    for task in evaluation.tasks:
        # Not exact shares: a task that runs out is made up for by the others.
        limit = evaluation.fidelity_samples
        samples = task_samples(task, modalities=modalities, seed=seed, limit=limit)
        if task.answer is not None:
            samples = [with_answer(s, scoring.expected_text(reference(task, s))) for s in samples]
        per_task.append(samples)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*per_task))
    drawn = [sample for sample in turns if sample is not None]
    return drawn[: evaluation.fidelity_samples]


def _pairs(float_model, model) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Module name -> (float linear, quantized linear)."""
    from masquant_cli.runtime.mas_linear import MasLinear

    pairs = {}
    for name, module in model.named_modules():
        if isinstance(module, MasLinear):
            try:
                linear = float_model.get_submodule(name)
            except AttributeError:
                linear = None
            shape = (module.out_features, module.in_features)
            if linear is None or tuple(getattr(linear, "weight", linear).shape) != shape:
                raise CheckError(
                    "the quantized model was not made from this float model",
                    where=name,
                    hint="give the float model named in the recipe that quantized it",
                )
            pairs[name] = (linear, module)
    if not pairs:
        raise CheckError(
            "the model holds no quantized linear, so there is nothing to compare",
            hint="leave out the float model, or set evaluation.fidelity_samples=0",
        )
    return pairs


def _their_index(model, modalities: Sequence[str]) -> Tensor:
    """int64 [M]: where the quantized model keeps each of `modalities`; its order is its own."""
    from masquant_cli.runtime.context import context_of

    theirs = context_of(model).modalities
    if set(theirs) != set(modalities):
        raise CheckError(
            f"the model was quantized for {', '.join(theirs)}, the recipe has "
            f"{', '.join(modalities)}",
            where="modalities",
            hint="name the modalities that the model was quantized with",
        )
    return torch.tensor([theirs.index(m) for m in modalities])


@contextlib.contextmanager
def _compared(
    model, linears: dict, ids: Tensor, theirs: Tensor, mask: Tensor, sums: dict
) -> Iterator[None]:
    """While open, every float linear's input also runs through its quantized counterpart."""
    from masquant_cli.runtime import modality_ids as stated

    device = next(module for _, module in linears.values()).weight_packed.device
    forced = theirs[ids.cpu()].to(device)

    def compare(name: str, quantized: nn.Module):
        def hook(_module, args: tuple, output: Tensor) -> None:
            with stated(model, forced):
                got = quantized(args[0].to(device))
            sums[name] += _energies(output, got, ids, mask, len(sums[name]))

        return hook

    hooks = [
        linear.register_forward_hook(compare(name, quantized))
        for name, (linear, quantized) in linears.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _energies(y: Tensor, other: Tensor, ids: Tensor, mask: Tensor, classes: int) -> Tensor:
    kept = torch.where(mask.bool(), ids, -1).flatten().to(y.device)
    other = other.to(y.device).reshape(-1, y.shape[-1])
    return metrics.energies(y.reshape(-1, y.shape[-1]), other, kept, classes).cpu()


def _forward(model, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(what enters lm_head, logits)."""
    caught: list[Tensor] = []
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _module, args: caught.append(args[0]))
    try:
        logits = model(**model_inputs(model, batch), use_cache=False).logits
    finally:
        hook.remove()
    return caught[0], logits


def _groups(sample: Sample, modalities: Sequence[str]) -> list[str]:
    kinds = [kind for kind in MEDIA if sample.media(kind)]
    found = {modality_of(kind, tuple(modalities)) for kind in kinds}
    if not found:
        return [modalities[0]]
    return [m for m in modalities if m in found]


def _mean_db(sums: dict[str, Tensor], modalities: Sequence[str]) -> dict[str, float | None]:
    result: dict[str, float | None] = {}
    for index, name in enumerate(modalities):
        pairs = [pair[index].tolist() for pair in sums.values()]
        values = [metrics.db(signal, noise) for signal, noise in pairs if signal > 0]
        result[name] = sum(values) / len(values) if values else None
    return result
