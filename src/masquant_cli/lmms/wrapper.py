"""The model classes that lmms-eval knows: float or quantized, any family that masquant loads.

`Masquant` takes a task's media and then its text; `MasquantChat` takes the messages of tasks
that write them themselves, such as MMMU, whose pictures stand within the question.
"""

from collections import defaultdict
from functools import partial
from pathlib import Path

from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms

from masquant_cli.data.inputs import with_answer
from masquant_cli.data.samples import Sample
from masquant_cli.errors import RecipeError
from masquant_cli.lmms import answers, messages
from masquant_cli.models.loading import Loaded, load_float, load_processor, pick_device, pick_dtype
from masquant_cli.progress import NullProgress, Progress
from masquant_cli.recipe import Model
from masquant_cli.stages.judge import is_quantized

MOST_NEW_TOKENS = 512  # where a task names no number
PARAGRAPH = "\n\n"  # lmms-eval's own stop for tasks that name none; it would cut off reasoning


def load(folder: str | Path, *, device: str = "auto", dtype: str = "auto") -> Loaded:
    """An exported or a float folder, ready to answer. Raises MasquantError."""
    path = Path(folder)
    if not path.is_dir() or not is_quantized(path):
        return load_float(Model(path=str(folder), dtype=dtype), device)
    from masquant_cli.runtime import load_quantized

    where, config = pick_device(device), _config(path)
    model = load_quantized(path, dtype=pick_dtype(dtype, where, config))
    return Loaded(model.to(where).eval(), load_processor(path), path)


class Masquant(lmms):
    """`--model masquant --model_args pretrained=DIR`; `max_frames` of a video are looked at."""

    is_simple = True

    def __init__(
        self,
        pretrained: str = "",
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        max_frames: int = 32,
        loaded: Loaded | None = None,
        progress: Progress | None = None,
        **unused,
    ):
        super().__init__()
        if unused.keys() - {"max_batch_size"}:
            raise RecipeError(
                f"unknown model_args: {', '.join(sorted(unused))}",
                where="--model_args",
                hint="known: pretrained, device, dtype, max_frames",
            )
        if loaded is None and not pretrained:
            raise RecipeError(
                "which model?", where="--model_args", hint="pretrained=RUN/export/model"
            )
        # lmms-eval takes devices like cuda:0 and batch sizes like auto.
        named = "auto" if not device else device.partition(":")[0]
        self.loaded = loaded or load(pretrained, device=named, dtype=dtype)
        self.batch_size = int(batch_size) if str(batch_size).isdigit() else 1
        self.max_frames = int(max_frames)
        self.progress = progress or NullProgress()

    @property
    def device(self):
        return self.loaded.model.device

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Greedy answers, cut at the task's stops. Sampling and beams that a task asks for are
        left out: what is compared here are models, not their luck."""
        groups: dict[tuple, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            groups[_wanted(self._options(request))].append(index)
        self.progress.stage("lmms-eval: answers", len(requests), "requests")
        texts = [""] * len(requests)
        for (most, until), rows in groups.items():
            chosen = [requests[i] for i in rows]
            found = answers.generate(
                self.loaded.model,
                self.loaded.processor,
                [partial(self._sample, request) for request in chosen],
                [len(str(request.args[0])) for request in chosen],
                max_new_tokens=most,
                batch_size=self.batch_size,
                progress=self.progress,
            )
            for row, text in zip(rows, found, strict=True):
                texts[row] = answers.cut(text, until)
        return texts

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(mean nats per token of the continuation, whether it is the greedy one): lmms-eval's
        multiple choice takes the smallest, so that these are losses, not logarithms."""
        self.progress.stage("lmms-eval: choices", len(requests), "requests")
        found = answers.losses(
            self.loaded.model,
            self.loaded.processor,
            [partial(self._continued, request) for request in requests],
            [len(str(request.args[0])) for request in requests],
            batch_size=self.batch_size,
            progress=self.progress,
        )
        # lmms-eval 0.7.3 makes a string of a bare pair, which its scoring cannot read.
        return [GenerationResult(text=pair) for pair in found]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refused: what to ask next depends on files that only its own class knows."""
        raise RecipeError(
            "this task asks in several rounds, which is not supported",
            where=requests[0].args[-2] if requests else None,
            hint="choose a task that asks once",
        )

    def _options(self, request: Instance) -> dict:
        return request.args[1]

    def _sample(self, request: Instance) -> Sample:
        context, _, show, number, task, split = request.args
        where = f"{task}, {split} {number}"
        visuals = show(self.task_dict[task][split][number]) if show else None
        return messages.from_visuals(visuals, context, where=where, frames=self.max_frames)

    def _continued(self, request: Instance) -> Sample:
        """The context and, as the assistant's message, the continuation."""
        context, continuation, *rest = request.args
        if not rest:  # without anything before it
            sample = messages.from_visuals(None, context, where="", frames=0)
            return with_answer(sample, continuation.strip())
        number, task, split = rest[1:]
        if callable(continuation):
            continuation = str(continuation(self.task_dict[task][split][number]))
        return with_answer(self._sample(request), continuation.strip())


class MasquantChat(Masquant):
    """For tasks with doc_to_messages."""

    is_simple = False

    def _options(self, request: Instance) -> dict:
        return request.args[2]

    def _sample(self, request: Instance) -> Sample:
        _, write, _, number, task, split = request.args
        written = write(self.task_dict[task][split][number])
        where = f"{task}, {split} {number}"
        return messages.from_chat(written, where=where, frames=self.max_frames)


def _wanted(options: dict | None) -> tuple[int, tuple[str, ...]]:
    """(max_new_tokens, until) of a request's generation_kwargs."""
    options = options or {}
    until = options.get("until") or ()
    until = (until,) if isinstance(until, str) else tuple(until)
    most = options.get("max_new_tokens") or options.get("max_gen_toks") or MOST_NEW_TOKENS
    return int(most), tuple(stop for stop in until if stop and stop != PARAGRAPH)


def _config(path: Path):
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(path)
