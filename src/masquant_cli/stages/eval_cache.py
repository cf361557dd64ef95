"""Answers that were paid for are kept: one JSON line per sample, added batch by batch.

A file belongs to one model, prompt and way of generating; a line to one sample by its content.
Scores in it are for readers: they are computed anew from the answers every time.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from masquant_cli.data.inputs import tokenizer_of
from masquant_cli.recipe import Task
from masquant_cli.rundir import disk_errors, fingerprint, versions

GENERATION = 1  # raise it when the same inputs come to give other answers


@dataclass(frozen=True)
class Cache:
    """The answers of one task by one model. `records`: sample key -> its line, without the key."""

    path: Path
    records: dict[str, dict] = field(default_factory=dict)

    def add(self, records: Iterable[dict]) -> None:
        """Append lines {"key", ...} and wait until they are on the disk."""
        lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab+") as file:
                if size := file.seek(0, os.SEEK_END):
                    file.seek(size - 1)
                    # After a line that a crash cut short, the next one starts anew.
                    lines = lines if file.read(1) == b"\n" else "\n" + lines
                file.write(lines.encode())
                file.flush()
                os.fsync(file.fileno())


def open_cache(folder: Path, task: Task, facts: dict, *, fresh: bool = False) -> Cache:
    """The task's cache in `folder`, which belongs to one model; `fresh` empties it.

    `facts` is what answers depend on besides the model's files and the task, see `facts_of`.
    """
    path = folder / f"{task.name}-{fingerprint([facts, _asked(task)])[:12]}.jsonl"
    if fresh:
        with disk_errors(path):
            path.unlink(missing_ok=True)
    return Cache(path, read(path))


def read(path: Path) -> dict[str, dict]:
    """Records by key, the last of each; lines that a crash cut short are left out."""
    if not path.exists():
        return {}
    with disk_errors(path):
        data = path.read_bytes()
    records = {}
    for line in data.split(b"\n"):
        try:
            record = json.loads(line)
            records[record.pop("key")] = record
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # not a line of ours: that sample is generated again
    return records


def facts_of(model, processor) -> dict:
    """Besides its files, what a model's answers depend on: how it is run and fed."""
    image_processor = getattr(processor, "image_processor", None)
    holder = processor if getattr(processor, "chat_template", None) else tokenizer_of(processor)
    kept = ("masquant", "torch", "transformers")
    return {
        "generation": GENERATION,
        "versions": {name: version for name, version in versions().items() if name in kept},
        "dtype": str(model.dtype),
        "device": str(model.device.type),
        "template": getattr(holder, "chat_template", None),
        "pictures": image_processor.to_dict() if image_processor is not None else None,
    }


def _asked(task: Task) -> dict:
    """What of a task shapes its answers. The rows are in the lines' keys, the metric in neither."""
    asked = task.model_dump(mode="json", include={"benchmark", "window"})
    asked["messages"] = task.source.model_dump(mode="json")["messages"]
    asked["scored"] = task.metric == "perplexity"
    return asked | ({} if asked["scored"] else {"max_new_tokens": task.max_new_tokens})
