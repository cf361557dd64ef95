"""Evaluation: a recipe's tasks on one model, with intervals, and its fidelity to the float one.

`prepare` decodes and encodes a task once; `score` runs a model on it. Comparing seven models
then pays for the media only once.
"""

import contextlib
from collections.abc import Iterator, Sequence, Set
from pathlib import Path

import torch
from torch import Tensor

from masquant_cli.data.inputs import model_inputs, tokenizer_of
from masquant_cli.progress import NullProgress, Progress
from masquant_cli.recipe import Evaluation, Modality, Task
from masquant_cli.stages import leak, scoring
from masquant_cli.stages.eval_cache import Cache, facts_of, open_cache
from masquant_cli.stages.finite import finite_or_fail
from masquant_cli.stages.prepare import Batch, Prepared, batches, prepare, prepare_all

Answers = Iterator[tuple[Batch, list[dict]]]  # a record per row of the batch

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
    cache: Path | None = None,
    fresh: bool = False,
    calibrated: Set[str] | None = None,
    allow_overlap: bool = False,
) -> dict:
    """{"tasks": {name: {metric, value, n, ci: [lo, hi], ci_method}}} and, given `float_model`
    and `evaluation.fidelity_samples` > 0, "sqnr_db", "sqnr_end_db", "kl" and "flip_rate", each
    {modality: number or None} (see `fidelity`).

    All but perplexity are percents. `prepared` reuses inputs made by `prepare`; `predictions`
    adds each task's generated texts. `cache` is a folder of this model's answers, which are
    taken from there (unless `fresh`) and kept there batch by batch. `calibrated` holds the
    hashes of calibration samples: a task's rows must not be among them (`allow_overlap`: they
    are counted under "overlap"). Raises RecipeError for data that cannot be used and CheckError
    for a model whose logits are not finite, and for overlap.
    """
    progress = progress or NullProgress()
    facts = facts_of(model, processor) if cache is not None else {}

    def scored(task, ready: Prepared | None = None) -> dict:
        kept = open_cache(cache, task, facts, fresh=fresh) if cache is not None else None
        if ready is None:
            ready = prepare(
                task,
                processor,
                modalities=modalities,
                seed=seed,
                batch_size=evaluation.batch_size,
                known=kept.records if kept else (),
            )
        counted = {}
        if calibrated is not None:
            allowed = leak.overlap(ready, calibrated, allow=allow_overlap, progress=progress)
            counted = {"overlap": allowed}
        words = {"progress": progress, "predictions": predictions, "cache": kept}
        return score(model, processor, ready, **words) | counted

    if prepared is None:  # one task at a time, so that only one is in memory
        tasks = {task.name: scored(task) for task in evaluation.tasks}
    else:
        tasks = {ready.task.name: scored(ready.task, ready) for ready in prepared}
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
    cache: Cache | None = None,
) -> dict:
    """{metric, value, n, ci: [lo, hi], ci_method} of one task, "predictions" if asked for, with
    every sample's (points, out of).

    What the metrics mean is in `scoring`; perplexity is exp(mean nats per token). Answers that
    `cache` holds are not generated again, new ones go there after every batch. Raises CheckError
    when a logit is not finite.
    """
    progress = progress or NullProgress()
    task, keys = prepared.task, prepared.keys
    records = dict(cache.records) if cache else {}
    known = frozenset(records)
    progress.stage(f"evaluate {task.name}", len(keys), "samples")
    if old := sum(key in known for key in keys):
        progress.note(f"{old} of {len(keys)} samples were answered before")
        progress.advance(old)
    answer = _nats if task.metric == "perplexity" else _texts
    with torch.no_grad(), greedy(model):
        todo = batches(prepared, processor, known=known)
        for batch, found in answer(model, processor, task, todo, progress):
            lines = [
                {"key": keys[row], **_shown(prepared, row, record)}
                for row, record in zip(batch.order, found, strict=True)
            ]
            if cache is not None:
                cache.add(lines)
            new = sum(line["key"] not in known for line in lines)
            records |= {line["key"]: line for line in lines}
            progress.advance(new, tokens=int(batch.inputs["attention_mask"].sum()))
    mine = [records[key] for key in keys]
    if task.metric == "perplexity":
        pairs = [(record["nats"], record["tokens"]) for record in mine]
        return {"metric": task.metric, **scoring.perplexity(task, pairs, seed=prepared.seed)}
    texts = [record["prediction"] for record in mine]
    pairs = [scoring.score(task, *pair) for pair in zip(prepared.references, texts, strict=True)]
    result = {"metric": task.metric, **scoring.result(task, pairs, seed=prepared.seed)}
    if predictions:
        expected = map(scoring.expected_text, prepared.references)
        result["predictions"] = [
            {"key": key, "expected": wanted, "predicted": text, "score": list(pair)}
            for key, wanted, text, pair in zip(keys, expected, texts, pairs, strict=True)
        ]
    return result


def _shown(prepared: Prepared, row: int, record: dict) -> dict:
    """A record with what makes it readable: the expected answer and today's score."""
    if prepared.task.metric == "perplexity":
        return record
    reference = prepared.references[row]
    points, out_of = scoring.score(prepared.task, reference, record["prediction"])
    shown = {"expected": scoring.expected_text(reference), "score": [points, out_of]}
    return record | shown


def _nats(model, _processor, task: Task, todo: Iterator[Batch], _progress) -> Answers:
    """Batches with {"nats", "tokens"} per sample: -sum ln p over the scored tokens."""
    for batch in todo:
        inputs = model_inputs(model, batch.inputs)
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        scored = batch.scored[:, 1:].to(logits.device)
        finite_or_fail(logits[scored], f"task {task.name}")
        targets = inputs["input_ids"][:, 1:][scored]
        loss = torch.nn.functional.cross_entropy(logits[scored].float(), targets, reduction="none")
        sums = torch.zeros(len(scored), 2, dtype=torch.float64)
        rows = scored.cpu().nonzero()[:, 0]
        pairs = torch.stack([loss.cpu().double(), torch.ones(len(rows), dtype=torch.float64)], 1)
        sums.index_add_(0, rows, pairs)
        yield batch, [{"nats": n, "tokens": int(count)} for n, count in sums.tolist()]


def _texts(model, processor, task: Task, todo: Iterator[Batch], progress) -> Answers:
    """Batches with {"prediction"} per sample, generated greedily."""
    import transformers

    tokenizer = tokenizer_of(processor)
    what = f"task {task.name}"

    def watch(_ids: Tensor, scores: Tensor) -> Tensor:
        finite_or_fail(scores, what)
        return scores

    processors = transformers.LogitsProcessorList([watch])
    for batch in todo:
        inputs = model_inputs(model, batch.inputs)
        tokens = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=task.max_new_tokens,
            logits_processor=processors,
        )
        new = tokens[:, inputs["input_ids"].shape[1] :]
        decoded = tokenizer.batch_decode(new, skip_special_tokens=True)
        progress.advance(0, tokens=new.numel())
        yield batch, [{"prediction": text.strip()} for text in decoded]


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
