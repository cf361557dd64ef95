"""The public benchmarks by name: where their rows are, what is asked and how answers are scored.

Plain data for recipes, `{benchmark: textvqa, samples: 500}`; nothing is imported or opened.
`data/benchmarks` reads the rows; columns in templates that no hub has are made there.
"""

import copy
import difflib
from typing import Any

FILES = (".parquet", ".json", ".jsonl", ".csv")  # a single file has one split, `train`

_LETTER = "Answer with the option's letter from the given choices directly."
_PHRASE = "Answer the question using a single word or phrase."


def _rows(dataset: str, split: str, prompt: str, *media: str, **source: Any) -> dict[str, Any]:
    content = [*({kind: kind} for kind in media), {"text": prompt}]
    messages = [{"role": "user", "content": content}]
    return {"dataset": dataset, "split": split, "messages": messages, "streaming": True, **source}


BENCHMARKS: dict[str, dict[str, Any]] = {
    "librispeech-test-other": {
        "metric": "wer",
        "normaliser": "whisper",
        "answer": "{text}",
        "max_new_tokens": 256,
        "source": _rows(
            "openslr/librispeech_asr",
            "test",
            "Transcribe the English audio into text without any punctuation marks.",
            "audio",
            subset="other",
        ),
    },
    "wenetspeech-test-net": {
        "metric": "cer",
        "answer": "{text}",
        "max_new_tokens": 256,
        "source": _rows(
            "lmms-lab-audio/WenetSpeech",
            "test_net",
            "请将这段中文语音转换为纯文本，去掉标点符号。",
            "audio",
        ),
    },
    "ocrbench": {
        "metric": "contains",
        "answer": "{answer}",
        "max_new_tokens": 128,
        "source": _rows("echo840/OCRBench", "test", "{question}", "image"),
    },
    "textvqa": {
        "metric": "vqa",
        "answer": "{answers}",
        "max_new_tokens": 32,
        "source": _rows("lmms-lab-encoder/textvqa", "validation", f"{{asked}}\n{_PHRASE}", "image"),
    },
    "vizwiz": {
        "metric": "vqa",
        "answer": "{answers}",
        "max_new_tokens": 32,
        "source": _rows(
            "lmms-lab-encoder/VizWiz-VQA",
            "val",
            "{asked}\nWhen the provided information is insufficient, respond with "
            f"'Unanswerable'.\n{_PHRASE}",
            "image",
        ),
    },
    "scienceqa": {
        "metric": "choice",
        "answer": "{answer}",
        "options": "choices",
        "max_new_tokens": 16,
        "source": _rows(
            "lmms-lab-encoder/ScienceQA",
            "test",
            f"{{context}}{{question}}\n{{lettered}}\n{_LETTER}",
            "image",
            subset="ScienceQA-IMG",
        ),
    },
    "mmmu": {
        "metric": "mmmu",
        "answer": "{answer}",
        "options": "options",
        "max_new_tokens": 128,
        "source": _rows(
            "lmms-lab-encoder/MMMU", "validation", "{question}\n{choices}\n{instruction}"
        ),
    },
    "omnibench": {
        "metric": "choice",
        "answer": "{answer}",
        "options": "options",
        "max_new_tokens": 128,
        "source": _rows(
            "lmms-lab-audio/Omni_Bench_fix",
            "train",
            f"Question:\n{{question}}\n\nOptions:\n{{lettered}}\n\n{_LETTER}",
            "audio",
            "image",
        ),
    },
    "wikitext2": {
        "metric": "perplexity",
        "window": 2048,
        "source": _rows(
            "Salesforce/wikitext",
            "test",
            "{text}",
            subset="wikitext-2-raw-v1",
            streaming=False,
            shuffle=False,
        ),
    },
}
BENCHMARKS["scienceqa-full"] = copy.deepcopy(BENCHMARKS["scienceqa"])
BENCHMARKS["scienceqa-full"]["source"]["subset"] = "ScienceQA-FULL"

SHORT = ("dataset", "split", "prompt")  # what a benchmark's task may say without `source`


def expand(given: dict[str, Any]) -> dict[str, Any]:
    """A task's keys over its benchmark's; `SHORT` keys go where they belong.

    Another dataset is a copy with the same columns: it has the same splits, unless it is a
    single file, and subsets only if `source.subset` says so. Raises ValueError.
    """
    name = given.get("benchmark")
    short = {key: given[key] for key in SHORT if given.get(key) is not None}
    if name is None:
        if short:
            raise ValueError(f"`{next(iter(short))}` is for tasks with a `benchmark`")
        return given
    if not isinstance(name, str) or name not in BENCHMARKS:
        raise ValueError(unknown(name))
    base = copy.deepcopy(BENCHMARKS[name])
    own = given.get("source") or {}
    if hasattr(own, "model_dump"):
        own = own.model_dump(mode="json", exclude_unset=True)
    if not isinstance(own, dict):
        return given  # whose type is the recipe's to refuse
    own = {**own, **{key: value for key, value in short.items() if key != "prompt"}}
    source = base.pop("source")
    if own.get("dataset", source["dataset"]) != source["dataset"]:
        source |= {"subset": None, "streaming": False}
        if str(own["dataset"]).lower().endswith(FILES):
            source["split"] = "train"
    source |= own
    if "prompt" in short:
        source["messages"] = _asking(short["prompt"], source["messages"])
    if given.get("metric", base["metric"]) != base["metric"]:  # these fit the benchmark's alone
        base = {key: base[key] for key in base if key not in ("normaliser", "window")}
    kept = {key: value for key, value in given.items() if key not in (*SHORT, "source")}
    return {"name": name, **base, **kept, "source": source}


def unknown(name: object) -> str:
    """What to say of a name that is no benchmark's."""
    close = difflib.get_close_matches(str(name), BENCHMARKS, n=1)
    near = f"did you mean {close[0]!r}? " if close else ""
    return f"no benchmark is called {name!r}; {near}there are {', '.join(sorted(BENCHMARKS))}"


def _asking(prompt: Any, messages: Any) -> list:
    """The messages with the user's last text replaced."""
    messages = copy.deepcopy(messages) if isinstance(messages, list) else []
    user = [m for m in messages if isinstance(m, dict) and m.get("role") == "user"]
    content = user[-1].get("content") if user else None
    for part in reversed(content if isinstance(content, list) else []):
        if isinstance(part, dict) and part.get("text") is not None:
            part["text"] = prompt
            return messages
    raise ValueError("`prompt` has no text of the user's to replace; use `source.messages`")
