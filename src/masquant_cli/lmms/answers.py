"""A model answers samples: greedy texts, or how likely it finds given ones."""

from collections.abc import Callable, Iterator, Sequence

import torch

from masquant_cli.data.inputs import encode, encode_scored, model_inputs, tokenizer_of
from masquant_cli.data.samples import Sample
from masquant_cli.progress import Progress
from masquant_cli.stages.evaluate import greedy
from masquant_cli.stages.finite import finite_or_fail

Make = Callable[[], Sample]  # media are decoded when their batch comes, not before


@torch.no_grad()
def generate(
    model,
    processor,
    makes: Sequence[Make],
    lengths: Sequence[int],
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: Progress,
) -> list[str]:
    """The greedy answer to every sample, in their order. `lengths` (of texts, say) only sorts.

    Raises RecipeError for samples that the processor refuses, CheckError for logits that are
    not finite.
    """
    import transformers

    texts = [""] * len(makes)
    tokenizer = tokenizer_of(processor)

    def watch(_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        finite_or_fail(scores, "lmms-eval")
        return scores

    watching = transformers.LogitsProcessorList([watch])
    with greedy(model):
        for rows in _batches(lengths, batch_size):
            batch = encode(processor, [makes[i]() for i in rows], for_generation=True)
            inputs = model_inputs(model, batch)
            tokens = model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                logits_processor=watching,
            )
            new = tokens[:, inputs["input_ids"].shape[1] :]
            for row, text in zip(
                rows, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True
            ):
                texts[row] = text.strip()
            progress.advance(len(rows), tokens=int(batch["attention_mask"].sum()) + new.numel())
    return texts


@torch.no_grad()
def losses(
    model,
    processor,
    makes: Sequence[Make],
    lengths: Sequence[int],
    *,
    batch_size: int,
    progress: Progress,
) -> list[tuple[float, bool]]:
    """(mean nats per token of the last, the assistant's, message; whether greedy search would
    have said just that) of every sample, in their order. The message's end marker counts.
    """
    found = [(0.0, False)] * len(makes)
    for rows in _batches(lengths, batch_size):
        batch, scored = encode_scored(processor, [makes[i]() for i in rows])
        inputs = model_inputs(model, batch)
        logits = model(**inputs, use_cache=False).logits[:, :-1].float()
        targets, mask = inputs["input_ids"][:, 1:], scored[:, 1:].to(logits.device)
        finite_or_fail(logits[mask], "lmms-eval")
        nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        mean = (nats * mask).sum(1) / mask.sum(1)
        said = ((logits.argmax(-1) == targets) | ~mask).all(1)
        for row, loss, same in zip(rows, mean.tolist(), said.tolist(), strict=True):
            found[row] = (loss, same)
        progress.advance(len(rows), tokens=int(batch["attention_mask"].sum()))
    return found


def cut(text: str, until: Sequence[str]) -> str:
    """`text` up to the first of the stops `until`."""
    ends = [text.find(stop) for stop in until if stop]
    return text[: min((end for end in ends if end >= 0), default=len(text))].strip()


def _batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for start in range(0, len(order), size):
        yield order[start : start + size]
