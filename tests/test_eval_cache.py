"""Answers are kept per sample: nothing is generated twice, and nothing stale is believed."""

import json
from types import SimpleNamespace

import pytest
import tiny_chat
import torch
from benchmark_rows import picture, write
from jobs import Interrupting

from masquant_cli import pipeline, recipe_yaml
from masquant_cli.cli import app
from masquant_cli.models.resolve import resolve
from masquant_cli.progress import NullProgress
from masquant_cli.recipe import Evaluation, Task
from masquant_cli.stages import evaluate as stage
from masquant_cli.stages import scoring
from masquant_cli.stages.eval_cache import Cache, facts_of, open_cache, read

WORDS = {"modalities": ("text", "vision", "audio"), "seed": 0}


@pytest.fixture(scope="module")
def processor():
    return tiny_chat.processor()


class Counting(torch.nn.Module):
    """Answers every prompt with its number, and remembers which it was asked."""

    def __init__(self, processor):
        super().__init__()
        self.tokenizer, self.asked = processor.tokenizer, []
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.generation_config = SimpleNamespace(eos_token_id=1, pad_token_id=0)

    def forward(self, input_ids, attention_mask): ...

    def generate(self, input_ids, attention_mask, max_new_tokens, **_):
        prompts = self.tokenizer.batch_decode(input_ids, skip_special_tokens=True)
        numbers = [int(p.split("number ")[1].split()[0]) for p in prompts]
        self.asked += numbers
        said = [f"is {n}" for n in numbers]
        new = self.tokenizer(said, padding=True, padding_side="right", return_tensors="pt")
        return torch.cat([input_ids, new["input_ids"]], 1)


class Notes(NullProgress):
    def __init__(self):
        self.notes, self.units, self.total = [], 0, None

    def stage(self, name, total, unit):
        self.total = total

    def advance(self, n=1, tokens=0):
        self.units += n

    def note(self, text):
        self.notes.append(text)


@pytest.fixture
def task(tmp_path) -> Task:
    """Seven pictures; the model is right about the even ones."""
    rows = [
        {"dataset": "d", "question": f"number {i} ", "question_type": "t", "image": picture(i),
         "answer": [str(i) if i % 2 == 0 else "no"]}
        for i in range(7)
    ]  # fmt: skip
    path = write(tmp_path / "rows.parquet", "ocrbench", rows)
    return Task(benchmark="ocrbench", dataset=str(path), name="ocr")


def run(task, processor, folder, model=None, progress=None, batch_size=2, **words):
    model = model or Counting(processor)
    settings = Evaluation(tasks=[task], batch_size=batch_size, fidelity_samples=0)
    words = {**WORDS, "cache": folder, "progress": progress, **words}
    found = stage.evaluate(model, processor, settings, **words)
    return found["tasks"][task.name], model.asked


def lines(folder) -> list[dict]:
    (path,) = folder.glob("*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_second_run_generates_nothing(task, processor, tmp_path):
    first, asked = run(task, processor, tmp_path / "c")
    assert sorted(asked) == list(range(7))
    assert first["value"] == pytest.approx(100 * 4 / 7)
    progress = Notes()
    again, asked = run(task, processor, tmp_path / "c", progress=progress)
    assert (again, asked) == (first, [])
    assert progress.notes == ["7 of 7 samples were answered before"]
    assert (progress.units, progress.total) == (7, 7)
    without, _ = run(task, processor, None)
    assert without == first
    kept = lines(tmp_path / "c")
    assert [set(line) for line in kept] == [{"key", "prediction", "expected", "score"}] * 7
    by = {line["expected"]: line for line in kept}
    assert (by["4"]["prediction"], by["4"]["score"]) == ("is 4", [1.0, 1.0])
    assert len({line["key"] for line in kept}) == 7


def test_an_interruption_keeps_what_was_answered(task, processor, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(task, processor, tmp_path / "c", progress=Interrupting("evaluate ocr", 4))
    assert len(lines(tmp_path / "c")) == 4
    result, asked = run(task, processor, tmp_path / "c")
    assert len(asked) == 3
    fresh, _ = run(task, processor, None)
    assert result == fresh
    assert len(lines(tmp_path / "c")) == 7


def test_inputs_made_beforehand_use_the_cache_too(task, processor, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(task, processor, tmp_path / "c", progress=Interrupting("evaluate ocr", 2))
    prepared = [stage.prepare(task, processor, **WORDS, batch_size=3)]
    progress = Notes()
    result, asked = run(task, processor, tmp_path / "c", prepared=prepared, progress=progress)
    # Two are known; a batch that holds an unknown one is answered whole.
    assert 5 <= len(asked) <= 7 and progress.units == 7
    assert result == run(task, processor, None)[0]
    assert run(task, processor, tmp_path / "c", prepared=prepared) == (result, [])


def test_a_line_cut_short_is_generated_again_and_spoils_no_other(task, processor, tmp_path):
    first, _ = run(task, processor, tmp_path / "c")
    (path,) = (tmp_path / "c").glob("*.jsonl")
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    result, asked = run(task, processor, tmp_path / "c")
    assert (result, len(asked)) == (first, 1)
    result, asked = run(task, processor, tmp_path / "c")
    assert (result, asked) == (first, [])
    path.write_bytes(b'null\n{"no": 1}\n[]\n\xff\xfe\n' + whole)
    result, asked = run(task, processor, tmp_path / "c")
    assert (result, asked) == (first, [])


def test_more_samples_cost_only_the_new_ones(task, processor, tmp_path):
    few = task.model_copy(update={"samples": 3})
    _, first = run(few, processor, tmp_path / "c")
    result, asked = run(task, processor, tmp_path / "c", batch_size=5)
    assert sorted(first + asked) == list(range(7)) and len(asked) == 4
    assert result == run(task, processor, None)[0]
    assert run(few, processor, tmp_path / "c")[1] == []


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "Now: {question}"},
        {"max_new_tokens": 5},
        {"source": {"messages": [
            {"role": "system", "content": [{"text": "Be brief."}]},
            {"role": "user", "content": [{"image": "image"}, {"text": "{question}"}]},
        ]}},
    ],
)  # fmt: skip
def test_another_prompt_is_another_question(task, processor, tmp_path, change):
    run(task, processor, tmp_path / "c")
    dataset = task.source.dataset
    changed = Task.model_validate(
        {"benchmark": "ocrbench", "name": "ocr", "dataset": dataset, **change}
    )
    assert sorted(run(changed, processor, tmp_path / "c")[1]) == list(range(7))
    assert len(list((tmp_path / "c").glob("ocr-*.jsonl"))) == 2
    assert run(task, processor, tmp_path / "c")[1] == []


def test_another_picture_behind_the_same_words_is_another_sample(task, processor, tmp_path):
    run(task, processor, tmp_path / "c")
    rows = [
        {"dataset": "d", "question": "number 3 ", "question_type": "t", "image": picture(i),
         "answer": ["3"]}
        for i in (3, 99)
    ]  # fmt: skip
    write(tmp_path / "rows.parquet", "ocrbench", rows)
    assert run(task, processor, tmp_path / "c")[1] == [3]


def test_another_metric_scores_what_was_said(task, processor, tmp_path):
    run(task, processor, tmp_path / "c")
    exact = task.model_copy(update={"metric": "accuracy", "answer": "is {answer}"})
    result, asked = run(exact, processor, tmp_path / "c")
    assert asked == []
    assert result["value"] == pytest.approx(100 * 4 / 7)


def test_scores_in_the_file_are_not_believed(task, processor, tmp_path, monkeypatch):
    run(task, processor, tmp_path / "c")
    monkeypatch.setattr(scoring, "score", lambda *_: (1.0, 1.0))
    result, asked = run(task, processor, tmp_path / "c")
    assert (result["value"], asked) == (100.0, [])


def test_fresh_forgets(task, processor, tmp_path):
    run(task, processor, tmp_path / "c")
    assert len(run(task, processor, tmp_path / "c", fresh=True)[1]) == 7
    assert len(lines(tmp_path / "c")) == 7


def test_perplexity_is_kept_too(task, processor, tmp_path, monkeypatch):
    model = tiny_chat.omni()
    messages = [
        {"role": "user", "content": [{"text": "{question}"}]},
        {"role": "assistant", "content": [{"text": "{answer}"}]},
    ]
    source = {"dataset": task.source.dataset, "messages": messages}
    chat = Task(name="chat", metric="perplexity", source=source)
    rows = write(tmp_path / "w.parquet", "wikitext2", [{"text": "one two " * 20}])
    running = Task(benchmark="wikitext2", dataset=str(rows), window=32)
    settings = Evaluation(tasks=[chat, running], batch_size=2, fidelity_samples=0)
    words = {**WORDS, "cache": tmp_path / "c"}
    first = stage.evaluate(model, processor, settings, **words)
    kept = read(next((tmp_path / "c").glob("chat-*")))
    assert all(set(record) == {"nats", "tokens"} for record in kept.values()) and len(kept) == 7
    monkeypatch.setattr(stage, "model_inputs", None)
    assert stage.evaluate(model, processor, settings, **words) == first


def test_what_a_cache_depends_on(task, processor, tmp_path):
    model = Counting(processor)
    facts = facts_of(model, processor)
    path = open_cache(tmp_path, task, facts).path
    assert open_cache(tmp_path, task, facts_of(model, tiny_chat.processor())).path == path
    model.dtype = torch.bfloat16
    assert open_cache(tmp_path, task, facts_of(model, processor)).path != path
    other = tiny_chat.processor(tiny_chat.TEMPLATE.replace("\n", " "))
    assert open_cache(tmp_path, task, facts_of(Counting(processor), other)).path != path
    other = tiny_chat.processor()
    other.image_processor.size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28}
    assert open_cache(tmp_path, task, facts_of(Counting(processor), other)).path != path
    assert open_cache(tmp_path, task.model_copy(update={"samples": 1}), facts).path == path
    assert not path.exists()


def test_the_last_line_of_a_sample_counts(tmp_path):
    cache = Cache(tmp_path / "deep/er.jsonl")
    cache.add([{"key": "a", "prediction": "1"}, {"key": "b", "prediction": "世"}])
    cache.add([{"key": "a", "prediction": "2"}])
    assert read(cache.path) == {"a": {"prediction": "2"}, "b": {"prediction": "世"}}


# --- through the command


def arguments(run_dir, *more: str) -> list[str]:
    model = str(resolve(recipe_yaml.load("tiny-omni-w4a8").model))
    return [
        *("eval", "-c", "tiny-omni-w4a8", "--run-dir", str(run_dir), "--model", model),
        *("--task", "text", "--samples", "24", "--set", "evaluation.batch_size=8", "--json"),
        *more,
    ]


def test_eval_resumes_after_ctrl_c(tmp_path, monkeypatch, capsys):
    honest, asked = Cache.add, []

    def add(self, records):
        honest(self, records)
        asked.extend(records)
        if len(asked) == 16:
            raise KeyboardInterrupt

    monkeypatch.setattr(Cache, "add", add)
    assert app.main(arguments(tmp_path / "run")) == 130
    assert "interrupted" in capsys.readouterr().err
    assert len(asked) == 16 and not (tmp_path / "run/eval/result.json").exists()
    assert app.main(arguments(tmp_path / "run")) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(asked) == 24
    assert document["tasks"]["text"]["n"] == 24
    written = json.loads((tmp_path / "run/eval/result.json").read_text())
    assert written == document
    (kept,) = (tmp_path / "run/eval").glob("*/text-*.jsonl")
    assert written["model_fingerprint"].startswith(kept.parent.name)
    assert json.loads((kept.parent / "result.json").read_text()) == written
    monkeypatch.setattr(Cache, "add", None)  # now everything is known
    assert app.main(arguments(tmp_path / "run")) == 0
    assert json.loads(capsys.readouterr().out) == document


def test_the_cache_is_one_models(tmp_path, monkeypatch):
    """Another folder's answers are not taken, though its name and size are the same."""
    import shutil

    from safetensors.torch import load_file, save_file

    recipe = recipe_yaml.load("tiny-omni-w4a8", ["evaluation.batch_size=8"])
    tasks = tuple(t for t in recipe.evaluation.tasks if t.name == "text")
    tasks = (tasks[0].model_copy(update={"samples": 8}),)
    evaluation = recipe.evaluation.model_copy(update={"tasks": tasks})
    recipe = recipe.model_copy(update={"evaluation": evaluation})
    folder = shutil.copytree(resolve(recipe.model), tmp_path / "model")
    right = pipeline.evaluate(recipe, tmp_path / "run", model=folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(k for k in tensors if k.endswith("layers.0.self_attn.o_proj.weight"))
    save_file(tensors | {name: -9 * tensors[name]}, folder / "model.safetensors", {"format": "pt"})
    wrong = pipeline.evaluate(recipe, tmp_path / "run", model=folder)
    assert wrong["model_fingerprint"] != right["model_fingerprint"]
    assert wrong["tasks"]["text"]["value"] < right["tasks"]["text"]["value"]
