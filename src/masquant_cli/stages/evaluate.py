"""Evaluation: a recipe's tasks on one model, with intervals, and its fidelity to the float one.

`prepare` decodes and encodes a task once; `score` runs a model on it. Comparing seven models
then pays for the media only once.
"""

import contextlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from masquant_cli.algo import metrics
from masquant_cli.data.inputs import model_inputs, tokenizer_of
from masquant_cli.data.text import normalise
from masquant_cli.errors import RecipeError
from masquant_cli.progress import NullProgress, Progress
from masquant_cli.recipe import Evaluation, Modality
from masquant_cli.stages.finite import finite_or_fail
from masquant_cli.stages.prepare import Prepared, batches, prepare, prepare_all

__all__ = ["Prepared", "evaluate", "prepare", "prepare_all", "score"]


def evaluate(
    model,
    processor,
    evaluation: Evaluation,
    *,
    modalities: tuple[Modality, ...],
    seed: int,
    float_model=None,
    progress: Progress | None = None,
    prepared: Sequence[Prepared] | None = None,
    predictions: bool = False,
) -> dict:
    """{"tasks": {name: {metric, value, n, ci: [lo, hi], ci_method}}} and, given `float_model`
    and `evaluation.fidelity_samples` > 0, "sqnr_db", "sqnr_end_db", "kl" and "flip_rate", each
    {modality: number or None} (see `fidelity`).

    Accuracy and WER are percents. `prepared` reuses inputs made by `prepare`; `predictions`
    adds each task's generated texts. Raises RecipeError for data that cannot be used and
    CheckError for a model whose logits are not finite.
    """
    progress = progress or NullProgress()
    if prepared is None:  # one task at a time, so that only one is in memory
        words = {"modalities": modalities, "seed": seed, "batch_size": evaluation.batch_size}
        prepared = (prepare(task, processor, **words) for task in evaluation.tasks)
    tasks = {
        item.task.name: score(model, processor, item, progress=progress, predictions=predictions)
        for item in prepared
    }
    result: dict = {"tasks": tasks}
    if float_model is not None and evaluation.fidelity_samples and evaluation.tasks:
        from masquant_cli.stages.fidelity import fidelity

        result |= fidelity(
            float_model,
            model,
            processor,
            evaluation,
            modalities=modalities,
            seed=seed,
            progress=progress,
        )
    return result


def score(
    model,
    processor,
    prepared: Prepared,
    *,
    progress: Progress | None = None,
    predictions: bool = False,
) -> dict:
    """{metric, value, n, ci: [lo, hi], ci_method} of one task, "predictions" if asked for.

    Accuracy: share of exact matches after `normalise`, percent, Wilson interval. WER: total
    edits over total reference words (corpus level), percent, bootstrap over samples.
    Perplexity: exp(mean nats per token), bootstrap over samples. Raises CheckError when a
    logit is not finite.
    """
    progress = progress or NullProgress()
    task = prepared.task
    progress.stage(f"evaluate {task.name}", len(prepared.keys), "samples")
    with torch.no_grad(), greedy(model):
        if task.metric == "perplexity":
            return _perplexity(model, processor, prepared, progress)
        texts = _generate(model, processor, prepared, progress)
    got = [normalise(text) for text in texts]
    wanted = [normalise(text) for text in prepared.references]
    result = _accuracy(got, wanted) if task.metric == "accuracy" else _wer(got, wanted, prepared)
    result = {"metric": task.metric, **result}
    if predictions:
        result["predictions"] = [
            {"key": key, "expected": expected, "predicted": text}
            for key, expected, text in zip(prepared.keys, prepared.references, texts, strict=True)
        ]
    return result


def _accuracy(got: list[str], wanted: list[str]) -> dict:
    hits, n = sum(map(str.__eq__, got, wanted)), len(wanted)
    low, high = metrics.wilson(hits, n)
    return _result(100 * hits / n, n, 100 * low, 100 * high, "wilson")


def _wer(got: list[str], wanted: list[str], prepared: Prepared) -> dict:
    import jiwer

    counts = [jiwer.process_words(a, b) for a, b in zip(wanted, got, strict=True)]
    edits = torch.tensor([c.substitutions + c.deletions + c.insertions for c in counts])
    words = torch.tensor([c.hits + c.substitutions + c.deletions for c in counts])
    low, high = metrics.bootstrap_ratio(edits, words, seed=prepared.seed)
    value = 100 * float(edits.sum() / words.sum())
    return _result(value, len(wanted), 100 * low, 100 * high, "bootstrap")


def _perplexity(model, processor, prepared: Prepared, progress: Progress) -> dict:
    nats, counts = torch.zeros(len(prepared.keys)), torch.zeros(len(prepared.keys))
    for batch in batches(prepared, processor):
        inputs = model_inputs(model, batch.inputs)
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        scored = batch.scored[:, 1:].to(logits.device)
        finite_or_fail(logits[scored], f"task {prepared.task.name}")
        targets = inputs["input_ids"][:, 1:][scored]
        loss = torch.nn.functional.cross_entropy(logits[scored].float(), targets, reduction="none")
        rows = torch.tensor(batch.order)[scored.cpu().nonzero()[:, 0]]
        nats.index_add_(0, rows, loss.cpu())
        counts.index_add_(0, rows, torch.ones(len(rows)))
        progress.advance(len(batch.order), tokens=int(batch.inputs["attention_mask"].sum()))
    if not counts.sum():
        raise RecipeError(
            f"task {prepared.task.name!r} has no text token to score",
            hint="add an assistant message, or text",
        )
    value = math.exp(min(float(nats.sum() / counts.sum()), 700.0))
    ends = metrics.bootstrap_ratio(nats, counts, seed=prepared.seed)
    low, high = (math.exp(min(end, 700.0)) for end in ends)
    result = _result(value, len(prepared.keys), low, high, "bootstrap")
    return {"metric": "perplexity", **result, "tokens": int(counts.sum())}


def _generate(model, processor, prepared: Prepared, progress: Progress) -> list[str]:
    import transformers

    texts = [""] * len(prepared.references)
    tokenizer = tokenizer_of(processor)
    what = f"task {prepared.task.name}"

    def watch(_ids: Tensor, scores: Tensor) -> Tensor:
        finite_or_fail(scores, what)
        return scores

    processors = transformers.LogitsProcessorList([watch])
    for batch in batches(prepared, processor):
        inputs = model_inputs(model, batch.inputs)
        tokens = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=prepared.task.max_new_tokens,
            logits_processor=processors,
        )
        new = tokens[:, inputs["input_ids"].shape[1] :]
        decoded = tokenizer.batch_decode(new, skip_special_tokens=True)
        for row, text in zip(batch.order, decoded, strict=True):
            texts[row] = text.strip()
        read = int(batch.inputs["attention_mask"].sum())
        progress.advance(len(batch.order), tokens=read + new.numel())
    return texts


@contextlib.contextmanager
def greedy(model, *, stop: bool = True):
    """While open, nothing of the checkpoint's generation config but the special tokens counts:
    a repetition penalty or a temperature of its own would change what is measured. Without
    `stop` the end token does not end a text."""
    import transformers

    saved = getattr(model, "generation_config", None)
    if saved is not None:
        names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
        kept = {name: getattr(saved, name, None) for name in names}
        if kept["pad_token_id"] is None:  # generate() would warn for every batch
            eos = kept["eos_token_id"]
            kept["pad_token_id"] = eos[0] if isinstance(eos, list) else eos
        if not stop:
            kept["eos_token_id"] = None
        model.generation_config = transformers.GenerationConfig(**kept)
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        if saved is not None:
            model.generation_config = saved


def _result(value: float, n: int, low: float, high: float, method: str) -> dict:
    return {"value": value, "n": n, "ci": [low, high], "ci_method": method}
