"""Every benchmark on rows with the hub's columns: what is asked, expected and scored."""

import json
import math
import re
from types import SimpleNamespace

import pytest
import tiny_chat
import torch
from benchmark_rows import picture, sound, write

from masquant_cli import recipe_yaml
from masquant_cli.benchmarks import BENCHMARKS
from masquant_cli.cli import app
from masquant_cli.cli.common import narrowed
from masquant_cli.data.audio import decode_audio
from masquant_cli.data.media import decode_image
from masquant_cli.errors import RecipeError
from masquant_cli.models.resolve import resolve
from masquant_cli.recipe import Evaluation, Task
from masquant_cli.stages import evaluate as stage
from masquant_cli.stages.fidelity import draw
from masquant_cli.stages.prepare import task_samples

MODALITIES = ("text", "vision", "audio")
WORDS = {"modalities": MODALITIES, "seed": 0}
PHRASE = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


@pytest.fixture(scope="module")
def processor():
    return tiny_chat.processor()


class Scripted(torch.nn.Module):
    """Answers a prompt from a table of pieces of prompts instead of thinking."""

    def __init__(self, processor, answers: dict[str, str]):
        super().__init__()
        self.tokenizer, self.answers, self.asked = processor.tokenizer, answers, []
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.generation_config = SimpleNamespace(eos_token_id=1, pad_token_id=0)

    def forward(self, input_ids, attention_mask): ...

    def generate(self, input_ids, attention_mask, max_new_tokens, **_):
        prompts = self.tokenizer.batch_decode(input_ids, skip_special_tokens=True)
        self.asked += prompts
        said = [next(a for q, a in self.answers.items() if q in prompt) for prompt in prompts]
        new = self.tokenizer(said, padding=True, padding_side="right", return_tensors="pt")
        return torch.cat([input_ids, new["input_ids"]], 1)


def task(tmp_path, name: str, rows: list[dict], **settings) -> Task:
    path = write(tmp_path / f"{name}.parquet", name, rows)
    settings = {"source": {"shuffle": False}, **settings}
    return Task(benchmark=name, dataset=str(path), **settings)


def prepared(made: Task, processor):
    return stage.prepare(made, processor, **WORDS, batch_size=2)


def score(made: Task, processor, answers: dict[str, str]) -> dict:
    return stage.score(Scripted(processor, answers), processor, prepared(made, processor))


def contents(made: Task) -> list[list]:
    """Per sample, the user's parts: texts as they are, media as (kind, sha of the content)."""
    found = []
    for sample in task_samples(made, **WORDS):
        (message,) = sample.messages
        found.append(
            [p["text"] if "text" in p else (p["type"], p[p["type"]]) for p in message["content"]]
        )
    return found


def same_picture(part, seed: int) -> bool:
    kind, image = part
    return kind == "image" and image.tobytes() == decode_image(picture(seed), None, "").tobytes()


def same_sound(part, seed: int) -> bool:
    kind, wave = part
    return kind == "audio" and (wave == decode_audio(sound(seed), None, "")).all()


def test_librispeech(tmp_path, processor):
    texts = ["MISTER BROWN DIDN'T SEE TWENTY ONE COLOURS", "GO ON THEN"]
    rows = [{"audio": sound(i), "text": text, "id": str(i)} for i, text in enumerate(texts)]
    made = task(tmp_path, "librispeech-test-other", rows)
    first, second = contents(made)
    assert same_sound(first[0], 0) and same_sound(second[0], 1)
    assert first[1] == "Transcribe the English audio into text without any punctuation marks."
    # Both are the same sentence to Whisper's normaliser but for "seen": 1 of 7 + 3 words.
    answers = {"Transcribe": "Mr. Brown did not seen 21 colors"}
    result = score(made.model_copy(update={"samples": 1}), processor, answers)
    assert (result["metric"], result["n"]) == ("wer", 1)
    assert result["value"] == pytest.approx(100 / 7)
    both = score(made, processor, {"Transcribe": "go on then"})
    assert both["value"] == pytest.approx(100 * 7 / 10)
    plain = made.model_copy(update={"normaliser": "plain", "samples": 1})
    assert score(plain, processor, answers)["value"] == pytest.approx(100 * 6 / 7)


def test_wenetspeech(tmp_path, processor):
    rows = [{"audio": sound(5), "text": "今天天气很好OK"}, {"audio": sound(6), "text": "再见"}]
    made = task(tmp_path, "wenetspeech-test-net", rows)
    assert contents(made)[1][1] == "请将这段中文语音转换为纯文本，去掉标点符号。"
    # 1 character wrong of the first 8, everything (7 insertions, 1 match at best) of the second
    answers = {"请": "今天，天氣 很好。ＯＫ"}
    one = score(made.model_copy(update={"samples": 1}), processor, answers)
    assert (one["metric"], one["value"], one["ci_method"]) == ("cer", 12.5, "bootstrap")
    both = score(made, processor, answers)
    assert both["value"] == pytest.approx(100 * (1 + 8) / 10)
    assert both["ci"][1] > 100  # errors may outnumber the characters


def test_ocrbench(tmp_path, processor):
    kinds = ["IIIT5K", "HME100k", "HME100k"]
    asked = ["what is written in the image?", "formula one?", "formula two?"]
    answers = [["CENTRE", "centre"], ["x ^ 2"], ["Y + 1"]]
    rows = [
        {"dataset": kind, "question": q, "question_type": "t", "answer": a, "image": picture(i)}
        for i, (kind, q, a) in enumerate(zip(kinds, asked, answers, strict=True))
    ]
    made = task(tmp_path, "ocrbench", rows)
    parts = contents(made)
    assert [p[1] for p in parts] == asked and all(
        same_picture(p[0], i) for i, p in enumerate(parts)
    )
    said = {"written": "It says Centre.", "one": "so x^2 it is", "two": "y+1"}
    result = score(made, processor, said)
    assert (result["metric"], result["n"], result["ci_method"]) == ("contains", 3, "wilson")
    assert result["value"] == pytest.approx(200 / 3)


@pytest.mark.parametrize("name", ["textvqa", "vizwiz"])
def test_questions_with_ten_annotators(tmp_path, processor, name):
    answers = [["Nokia"] * 2 + ["the nokia"] + ["lg"] * 7, ["unanswerable"] * 10]
    rows = [
        {"question": q, "question_id": None, "image": picture(i), "answers": a}
        for i, (q, a) in enumerate(zip(["what BRAND is it?", "who?"], answers, strict=True))
    ]
    made = task(tmp_path, name, rows)
    extra = "When the provided information is insufficient, respond with 'Unanswerable'.\n"
    extra = extra if name == "vizwiz" else ""
    assert contents(made)[0][1] == f"What brand is it?\n{extra}{PHRASE}"
    assert same_picture(contents(made)[1][0], 1)
    result = score(made, processor, {"brand": "A Nokia.", "Who": "Unanswerable"})
    # 3 of 10: three annotators see two others, seven see three
    assert result["value"] == pytest.approx(100 * ((3 * 2 / 3 + 7) / 10 + 1) / 2)
    assert (result["metric"], result["ci_method"]) == ("vqa", "bootstrap")
    low, high = result["ci"]
    assert low == pytest.approx(90) and high == pytest.approx(100)
    model = Scripted(processor, {"brand": "A Nokia.", "Who": "no"})
    rows = stage.score(model, processor, prepared(made, processor), predictions=True)["predictions"]
    assert [(row["expected"], row["predicted"]) for row in rows] == [
        ("lg", "A Nokia."), ("unanswerable", "no"),
    ]  # fmt: skip
    assert [row["score"] for row in rows] == [pytest.approx([0.9, 1]), [0, 1]]


def test_scienceqa(tmp_path, processor):
    rows = [
        {"image": picture(3), "question": "Which is hot?", "choices": ["ice", "fire"], "answer": 1,
         "hint": "Look at it."},
        {"image": None, "question": "Which is wet?", "choices": ["sea", "sand", "sun"],
         "answer": 0, "hint": ""},
    ]  # fmt: skip
    made = task(tmp_path, "scienceqa", rows)
    with_picture, without = contents(made)
    assert same_picture(with_picture[0], 3)
    assert with_picture[1] == (f"Context: Look at it.\nWhich is hot?\nA. ice\nB. fire\n{LETTER}")
    assert without == [f"Which is wet?\nA. sea\nB. sand\nC. sun\n{LETTER}"]
    result = score(made, processor, {"hot": "B. fire", "wet": "B"})
    assert (result["metric"], result["value"], result["n"]) == ("choice", 50.0, 2)
    # Only rows with a picture, as the hub's other subset has them.
    full = BENCHMARKS["scienceqa-full"]["source"]
    assert full["subset"] == "ScienceQA-FULL"
    assert {**full, "subset": "ScienceQA-IMG"} == BENCHMARKS["scienceqa"]["source"]


@pytest.fixture
def mmmu(tmp_path) -> Task:
    rows = [
        {
            "id": "validation_Art_1",
            "question": "<image 1> Who painted it, and <image 2>?",
            "options": "['Goya', \"D'Arc\", '<image 3>']",
            "image_1": picture(1), "image_2": picture(2), "image_3": picture(3),
            "answer": "B", "question_type": "multiple-choice",
        },
        {
            "id": "validation_Math_2", "question": "How much is <image 1>", "options": "[]",
            "image_1": picture(4), "answer": "['8.5', '17/2']", "question_type": "open",
        },
        {
            "id": "validation_Math_3", "question": "How long is it", "options": "[]",
            "answer": "12", "question_type": "open",
        },
    ]  # fmt: skip
    return task(tmp_path, "mmmu", rows)


def test_mmmu_interleaves_its_pictures(mmmu):
    first, second, third = contents(mmmu)
    assert [same_picture(first[i], seed) for i, seed in ((0, 1), (2, 2), (4, 3))] == [True] * 3
    assert [first[i] for i in (1, 3, 5)] == [
        "Who painted it, and", "?\nA. Goya\nB. D'Arc\nC.", LETTER,
    ]  # fmt: skip
    assert second[0] == "How much is" and same_picture(second[1], 4) and second[2] == PHRASE
    assert third == [f"How long is it\n\n{PHRASE}"]


def test_mmmu_scores_both_kinds_of_questions(mmmu, processor):
    said = {"painted": "It is D'Arc", "much": "The answer is 8.50", "long": "about 13"}
    result = score(mmmu, processor, said)
    assert (result["metric"], result["n"]) == ("mmmu", 3)
    assert result["value"] == pytest.approx(200 / 3)
    assert result["ci"] == pytest.approx([20.77, 93.85], abs=0.01)


def test_mmmu_samples_come_back_when_memory_is_short(mmmu, processor):
    """Rows without their pictures must be decoded, and interleaved, once more."""
    words = {**WORDS, "batch_size": 1}
    kept = stage.prepare(mmmu, processor, **words)
    waiting = stage.prepare(mmmu, processor, **words, keep_bytes=0)
    for made in (kept, waiting):
        made_inputs = [b.inputs["input_ids"].tolist() for b in stage.batches(made, processor)]
        assert made_inputs == [part.inputs["input_ids"].tolist() for part in kept.parts]


def test_omnibench(tmp_path, processor):
    row = {"question": "Who speaks?", "options": ["a man", "a dog", "A", "nobody"]}
    rows = [
        row | {"answer": "a dog", "audio": sound(1), "image": picture(1)},
        row | {"answer": "A", "question": "Which?", "audio": sound(2), "image": picture(2)},
    ]
    made = task(tmp_path, "omnibench", rows)
    audio, image, text = contents(made)[1]
    assert same_sound(audio, 2) and same_picture(image, 2)
    assert text == (
        f"Question:\nWhich?\n\nOptions:\nA. a man\nB. a dog\nC. A\nD. nobody\n\n{LETTER}"
    )
    # The expected answer is a text: option C reads "A".
    result = score(made, processor, {"speaks": "B", "Which": "C."})
    assert (result["value"], result["n"]) == (100.0, 2)
    assert score(made, processor, {"speaks": "B", "Which": "A"})["value"] == 50.0


def test_wikitext_is_scored_in_windows_of_the_whole_text(tmp_path, processor):
    model = tiny_chat.omni()
    texts = ["", " = Heading = \n", " eight words are enough to tell it apart . \n", "", "end"]
    made = task(tmp_path, "wikitext2", [{"text": t} for t in texts], window=16)
    ids = torch.tensor(processor.tokenizer("\n\n".join(texts))["input_ids"])
    count = len(ids) // 16
    assert len(ids) % 16 and count > 2
    nats = []
    for start in range(0, count * 16, 16):
        piece = ids[start : start + 16]
        mask = torch.ones_like(piece)[None]
        with torch.no_grad():
            logs = model(input_ids=piece[None], attention_mask=mask).logits[0].log_softmax(-1)
        nats += [-float(logs[i, piece[i + 1]]) for i in range(15)]
    result = stage.score(model, processor, prepared(made, processor))
    assert (result["n"], result["tokens"]) == (count, 15 * count)
    assert result["value"] == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-5)
    fewer = stage.score(
        model, processor, prepared(made.model_copy(update={"samples": 2}), processor)
    )
    assert fewer["value"] == pytest.approx(math.exp(sum(nats[:30]) / 30), rel=1e-5)
    with pytest.raises(RecipeError, match="a window has 2048"):
        prepared(made.model_copy(update={"window": 2048}), processor)
    assert [s.row["text"] for s in task_samples(made, **WORDS)] == [texts[2]]


# --- tasks that are named


def test_a_folder_as_the_hub_lays_it_out(tmp_path, processor):
    """Splits by file name, subsets by the card's configs, as `hf download` brings them."""
    rows = [{"image": picture(1), "question": "q", "choices": ["x"], "answer": 0, "hint": ""}]
    for name in ("ScienceQA-IMG", "ScienceQA-FULL"):
        write(tmp_path / f"{name}/test-00000-of-00001.parquet", "scienceqa", rows)
        rows = [*rows, {**rows[0], "question": "another"}]
    config = "- config_name: {0}\n  data_files: [{{split: test, path: {0}/test-*}}]\n"
    configs = "".join(map(config.format, ("ScienceQA-IMG", "ScienceQA-FULL")))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    source = {"dataset": str(tmp_path), "subset": "ScienceQA-FULL"}
    assert len(contents(Task(benchmark="scienceqa", source=source))) == 2
    with pytest.raises(RecipeError, match="no subset"):
        contents(Task(benchmark="scienceqa", dataset=str(tmp_path)))


def test_rows_of_a_stream(tmp_path):
    rows = [{"audio": sound(i), "text": str(i)} for i in range(3)]
    write(tmp_path / "data/test_net-00000-of-00001.parquet", "wenetspeech-test-net", rows)
    source = {"dataset": str(tmp_path), "streaming": True, "shuffle": False}
    made = Task(benchmark="wenetspeech-test-net", source=source, samples=2)
    first, second = contents(made)
    assert same_sound(first[0], 0) and same_sound(second[0], 1)
    with pytest.raises(RecipeError, match="no column 'transcript'"):
        contents(made.model_copy(update={"answer": "{transcript}"}))


def test_every_part_of_a_benchmark_can_be_overridden():
    plain = Task(benchmark="textvqa")
    assert (plain.name, plain.metric, plain.source.split) == ("textvqa", "vqa", "validation")
    assert plain.source.streaming and plain.source.messages[0].content[0].image == "image"
    prompt = "{question} ({image_id})"
    mine = Task(benchmark="textvqa", name="mine", dataset="./my/textvqa", prompt=prompt, samples=3)
    assert (mine.name, mine.samples, mine.max_new_tokens) == ("mine", 3, plain.max_new_tokens)
    assert (mine.source.dataset, mine.source.split) == ("./my/textvqa", "validation")
    assert not mine.source.streaming
    assert [p.text for p in mine.source.messages[0].content] == [None, prompt]
    file = Task(benchmark="scienceqa", dataset="x.parquet")
    assert (file.source.split, file.source.subset) == ("train", None)
    assert Task(benchmark="scienceqa", dataset="x.jsonl", split="test").source.split == "test"
    same = Task(benchmark="scienceqa", dataset="lmms-lab-encoder/ScienceQA", split="validation")
    assert (same.source.subset, same.source.split) == ("ScienceQA-IMG", "validation")
    other = Task(benchmark="librispeech-test-other", metric="accuracy")
    assert other.normaliser == "plain"


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_a_resolved_task_reads_back_as_it_is(name):
    made = Task(benchmark=name, samples=5, dataset="somewhere/else")
    assert Task.model_validate(made.model_dump(mode="json")) == made
    assert made.prompt is made.dataset is made.split is None


@pytest.fixture
def recipe_with(tmp_path):
    def load(*lines: str):
        tasks = "".join(f"\n    - {line}" for line in lines)
        text = f"extends: tiny-omni-w4a8\nname: mine\nevaluation:\n  tasks:{tasks}\n"
        (tmp_path / "r.yaml").write_text(text)
        return recipe_yaml.load(str(tmp_path / "r.yaml"))

    return load


def test_benchmarks_in_a_recipe(recipe_with):
    made = recipe_with("{benchmark: ocrbench, samples: 7}", "{benchmark: mmmu, name: m}")
    assert [(t.name, t.metric, t.samples) for t in made.evaluation.tasks] == [
        ("ocrbench", "contains", 7), ("m", "mmmu", None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{benchmark: textvq}", r"r.yaml:5.*no benchmark .* did you mean 'textvqa'\?.*vizwiz"),
        ("{benchmark: [a]}", "no benchmark is called"),
        ("{benchmark: textvqa, sample: 3}", r"sample.*did you mean `samples`"),
        ("{benchmark: textvqa, source: 3}", r"source"),
        ("{benchmark: textvqa, source: {messages: 3}, prompt: x}", "no text of the user's"),
        ("{name: a, metric: wer, prompt: x}", "`prompt` is for tasks with a `benchmark`"),
        ("{benchmark: textvqa, metric: choice}", "needs `options`"),
        ("{benchmark: textvqa, window: 3}", "`window` is for metric perplexity"),
        ("{benchmark: textvqa, normaliser: whisper}", "`normaliser` is for metric wer"),
    ],
)
def test_benchmark_lines_that_are_wrong(recipe_with, line, message):
    with pytest.raises(RecipeError) as caught:
        recipe_with(line)
    error = caught.value
    assert re.search(message, f"{error.where}: {error} {error.hint}")


def test_naming_a_benchmark_on_the_command_line_adds_it():
    recipe = recipe_yaml.load("tiny-omni-w4a8")
    found = narrowed(recipe, ["textvqa", "sum"], 9).evaluation.tasks
    assert [(t.name, t.samples) for t in found] == [("sum", 9), ("textvqa", 9)]
    assert found[1].benchmark == "textvqa"
    with pytest.raises(RecipeError, match="no task 'textvca'") as caught:
        narrowed(recipe, ["textvca"], None)
    assert "did you mean 'textvqa'?" in caught.value.hint
    assert "picture" in caught.value.hint and "omnibench" in caught.value.hint


# --- what can be wrong with the data


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("textvqa", "answers"), ("textvqa", "question"), ("ocrbench", "dataset"),
        ("scienceqa", "choices"), ("mmmu", "question_type"), ("omnibench", "audio"),
    ],
)  # fmt: skip
def test_a_missing_column_is_named_before_anything_runs(tmp_path, processor, name, lost):
    import pyarrow.parquet as pq

    path = write(tmp_path / "whole.parquet", name, [{}])
    pq.write_table(pq.read_table(path).drop([lost]), tmp_path / "part.parquet")
    with pytest.raises(RecipeError, match=f"no column '{lost}'") as caught:
        prepared(Task(benchmark=name, dataset=str(tmp_path / "part.parquet")), processor)
    assert "part.parquet" in caught.value.where and "columns are" in caught.value.hint


@pytest.mark.parametrize("name", sorted(set(BENCHMARKS) - {"scienceqa-full"}))
def test_an_empty_split(tmp_path, processor, name):
    with pytest.raises(RecipeError, match="split 'train' has no rows"):
        prepared(task(tmp_path, name, []), processor)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("vizwiz", {"question": "q", "image": 0, "answers": ["a"] * 3}, "at least 4"),
        ("vizwiz", {"question": "q", "image": 0, "answers": None}, "'answers' is empty"),
        ("ocrbench", {"question": "q", "image": 0, "answer": [" "]}, "expected answer is empty"),
        ("mmmu", {"question": "<image 2>", "options": "[]", "answer": "1",
                  "question_type": "open"}, "image column is empty"),
        ("mmmu", {"question": "<image 9>", "options": "[]", "answer": "1",
                  "question_type": "open"}, "no column 'image_9'"),
        ("mmmu", {"question": "q", "options": "[", "answer": "A",
                  "question_type": "multiple-choice"}, "no list of at most 26"),
        ("mmmu", {"question": "q", "options": "['x']", "answer": "B",
                  "question_type": "multiple-choice"}, "none of the 1 options"),
        ("mmmu", {"question": "q", "options": "[]", "answer": "1", "question_type": "essay"},
         "question_type is 'essay'"),
        ("wenetspeech-test-net", {"audio": 0, "text": "。"}, "expected answer is empty"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_scored(tmp_path, processor, name, row, message):
    media = {"image": picture, "audio": sound}
    row = {k: media[k](v) if k in media else v for k, v in row.items()}
    with pytest.raises(RecipeError, match=message) as caught:
        prepared(task(tmp_path, name, [row]), processor)
    assert "row 0" in caught.value.where


def test_a_transcript_of_fillers_has_no_words(tmp_path, processor):
    rows = [{"audio": sound(1), "text": "UH HMM"}]
    made = task(tmp_path, "librispeech-test-other", rows)
    with pytest.raises(RecipeError, match="no expected answer has a word"):
        score(made, processor, {"Transcribe": "what"})
    rows.append({"audio": sound(2), "text": "YES"})
    made = task(tmp_path, "librispeech-test-other", rows)
    assert score(made, processor, {"Transcribe": "yes"})["value"] == 100.0  # one insertion


@pytest.mark.parametrize("name", ["mmmu", "omnibench", "librispeech-test-other"])
def test_a_recipe_without_the_modality_a_benchmark_needs(tmp_path, processor, name):
    made = task(tmp_path, name, [{}])
    lacking = ("text", "audio") if name == "mmmu" else ("text", "vision")
    with pytest.raises(RecipeError, match=r"modalities .* lack"):
        stage.prepare(made, processor, modalities=lacking, seed=0, batch_size=1)


def test_a_model_that_cannot_see(mmmu):
    tokenizer = tiny_chat.processor().tokenizer  # a text model's processor
    with pytest.raises(RecipeError, match="shows image, and the model reads text alone"):
        stage.prepare(mmmu, tokenizer, modalities=("text",), seed=0, batch_size=1)


def test_fidelity_forces_one_answer_of_a_task(tmp_path, mmmu):
    answers = ["b"] * 4 + ["a"] * 5 + ["c"]
    row = {"question": "q", "image": picture(1), "answers": answers, "question_id": "1"}
    tasks = [mmmu, task(tmp_path, "vizwiz", [row])]
    drawn = draw(Evaluation(tasks=tasks, fidelity_samples=9), **WORDS)
    forced = [sample.messages[-1]["content"][0]["text"] for sample in drawn]
    assert forced == ["B", "a", "8.5", "12"]


# --- the whole command, on a real model


def test_eval_of_every_benchmark_at_once(tmp_path, capsys):
    """Scores mean nothing here: that every row goes through a real processor and model does."""
    mc = {"question": "Which?", "options": ["x", "y"], "answer": "x"}
    pair = {"audio": sound(1), "image": picture(1)}
    rows = {
        "librispeech-test-other": [{"audio": sound(i), "text": "ONE TWO"} for i in range(3)],
        "wenetspeech-test-net": [{"audio": sound(1), "text": "你好"}],
        "ocrbench": [{"dataset": "d", "question": "q", "image": picture(1), "answer": ["7"]}],
        "textvqa": [{"question": "q", "image": picture(2), "answers": ["red"] * 10}],
        "vizwiz": [{"question": "q", "image": picture(3), "answers": ["red"] * 10}],
        "scienceqa": [
            {"question": "q", "image": image, "choices": ["a", "b"], "answer": 0, "hint": ""}
            for image in (picture(4), None)
        ],
        "mmmu": [
            {"question": "<image 1>?", "options": "['<image 2>', 'b']", "answer": "B",
             "image_1": picture(5), "image_2": picture(6), "question_type": "multiple-choice"},
            {"question": "How many", "options": "[]", "answer": "3", "question_type": "open"},
        ],
        "omnibench": [mc | pair],
        "wikitext2": [{"text": "seven plus two is nine and that is all . "}] * 9,
    }  # fmt: skip
    lines = []
    for name, content in rows.items():
        path = write(tmp_path / f"{name}.parquet", name, content)
        more = ", window: 24" if name == "wikitext2" else ", max_new_tokens: 4"
        lines.append(f"    - {{benchmark: {name}, dataset: {path}{more}}}\n")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"extends: tiny-omni-w4a8\nname: all\nevaluation:\n  tasks:\n{''.join(lines)}"
    )
    model = str(resolve(recipe_yaml.load("tiny-omni-w4a8").model))
    argv = ["eval", "-c", str(recipe), "--run-dir", str(tmp_path / "run"), "--model", model]
    assert app.main([*argv, "--json"]) == 0
    tasks = json.loads(capsys.readouterr().out)["tasks"]
    assert {n: t["metric"] for n, t in tasks.items()} == {n: BENCHMARKS[n]["metric"] for n in rows}
    assert tasks.pop("wikitext2")["n"] >= 3
    assert {n: t["n"] for n, t in tasks.items()} == {n: len(rows[n]) for n in tasks}
    assert app.main(argv) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in rows) and "0.0%" in table
