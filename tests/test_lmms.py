"""lmms-eval: what its tasks show as our messages, answers and losses, and, where it is installed,
its own tasks on local data of the real ones' schema, float and quantized.
"""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from jobs import small
from PIL import Image

from masquant_cli import pipeline
from masquant_cli.cli import app
from masquant_cli.data.inputs import encode_scored, model_inputs, with_answer
from masquant_cli.data.samples import load_samples
from masquant_cli.errors import EnvironmentProblem, RecipeError
from masquant_cli.lmms import answers, backend, messages
from masquant_cli.models.loading import load_float
from masquant_cli.progress import NullProgress
from masquant_cli.recipe import Model
from masquant_cli.stages.evaluate import evaluate

DATA = Path(__file__).parents[1] / "src/masquant_cli/assets/tiny-omni/data"
needs_lmms = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None,
    reason="lmms-eval is not installed (pip install 'masquant[lmms]')",
)
RED = Image.new("RGB", (28, 42), (250, 3, 7))
HOW = {"where": "here", "frames": 4}


def kinds(sample):
    return [part["type"] for message in sample.messages for part in message["content"]]


def test_media_come_before_the_text_in_their_order():
    wave = {"array": np.ones(160), "sampling_rate": 8000, "path": "x.wav"}
    sample = messages.from_visuals([[RED], wave, [RED]], "Why?", **HOW)
    assert kinds(sample) == ["image", "audio", "image", "text"]
    parts = sample.messages[0]["content"]
    assert sample.messages[0]["role"] == "user" and parts[-1]["text"] == "Why?"
    assert parts[0]["image"].getpixel((5, 5)) == (250, 3, 7)
    assert parts[1]["audio"].shape == (320,) and parts[1]["audio"].dtype == np.float32
    assert kinds(messages.from_visuals(None, "Why?", **HOW)) == ["text"]
    assert kinds(messages.from_visuals(RED, "Why?", **HOW)) == ["image", "text"]


def test_media_in_every_form_that_data_sets_give(tmp_path):
    file = tmp_path / "red.png"
    RED.save(file)
    heard = SimpleNamespace(data=torch.full((2, 160), 0.5), sample_rate=16000)
    decoder = SimpleNamespace(get_all_samples=lambda: heard)  # torchcodec's
    shown = [str(file), {"bytes": file.read_bytes(), "path": "a.png"}, decoder,
             np.zeros((5, 7, 3), np.uint8), np.zeros((3, 5, 7, 3), np.uint8)]  # fmt: skip
    sample = messages.from_visuals(shown, "", **HOW)
    assert kinds(sample) == ["image", "image", "audio", "image", "video", "text"]
    parts = sample.messages[0]["content"]
    assert np.array_equal(parts[2]["audio"], np.full(160, 0.5, np.float32))
    assert parts[3]["image"].size == (7, 5) and len(parts[4]["video"]) == 3


def test_chats_keep_their_order_and_roles():
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [
            {"type": "text", "text": "Is"},
            {"type": "image", "url": RED},
            {"type": "text", "text": "like"},
            {"type": "video", "url": {"array": np.ones(16), "sampling_rate": 16000}},
            {"type": "image", "image": RED},
        ]},
    ]  # fmt: skip
    sample = messages.from_chat(chat, **HOW)
    assert [m["role"] for m in sample.messages] == ["system", "user"]
    # lmms-eval calls a waveform a video when it writes the messages itself.
    assert kinds(sample) == ["text", "text", "image", "text", "audio", "image"]


@pytest.mark.parametrize(
    ("visual", "said"),
    [
        (object(), "shows a object"),
        ("nowhere.mp4", "does not exist"),
        ({"type": "video", "url": "a.mp4", "video_start": 1.0}, "piece of a video"),
        ("nowhere.png", "does not exist"),
    ],
)
def test_what_cannot_be_shown_says_where(visual, said):
    with pytest.raises(RecipeError, match=said) as caught:
        messages.from_visuals([visual], "?", **HOW)
    assert caught.value.where == "here"


def test_cut_ends_at_the_first_stop():
    assert answers.cut("four Q: five\nsix", ["\n", "Q:", ""]) == "four"
    assert answers.cut(" four ", []) == "four"


@pytest.fixture(scope="module")
def tiny():
    return load_float(Model(path="builtin:tiny-omni"), "cpu")


def rows_of(recipe, name, n):
    task = next(t for t in recipe.evaluation.tasks if t.name == name)
    rows = load_samples(task.source, seed=0, modalities=recipe.modalities)
    return [sample for sample, _ in zip(rows, range(n), strict=False)]


def test_losses_are_those_of_one_sample_at_a_time(tiny):
    """Against cross entropy written out, with answers of several lengths in one padded batch."""
    samples = rows_of(small(), "sum", 3) + rows_of(small(), "text", 2)
    said = ["fourteen", "two", "one nine four seven", "zero", "eight"]
    makes = [lambda s=s, a=a: with_answer(s, a) for s, a in zip(samples, said, strict=True)]
    found = answers.losses(
        tiny.model, tiny.processor, makes, [3, 5, 2, 9, 1], batch_size=5, progress=NullProgress()
    )
    for make, (loss, greedy) in zip(makes, found, strict=True):
        batch, scored = encode_scored(tiny.processor, [make()])
        with torch.no_grad():
            logits = tiny.model(**model_inputs(tiny.model, batch)).logits[0].double()
        at = scored[0].nonzero()[:, 0]
        wanted = batch["input_ids"][0, at]
        logs = logits.log_softmax(-1)[at - 1]
        assert loss == pytest.approx(-logs[range(len(at)), wanted].mean().item(), rel=1e-4)
        assert greedy == bool((logs.argmax(-1) == wanted).all())
        assert len(at) >= 2  # a word and the end marker


def test_answers_are_in_order_and_do_not_depend_on_the_batch(tiny):
    samples = rows_of(small(), "transcription", 4) + rows_of(small(), "text", 3)
    makes = [lambda s=s: s for s in samples]

    def ask(size, most=12):
        return answers.generate(
            tiny.model, tiny.processor, makes, [1, 4, 2, 3, 9, 9, 0],
            max_new_tokens=most, batch_size=size, progress=NullProgress(),
        )  # fmt: skip

    whole = ask(7)
    assert whole == ask(1)
    expected = [s.row["answer"] for s in samples]
    assert sum(a == b for a, b in zip(whole, expected, strict=True)) >= 5  # the model is good
    assert [len(text.split()) for text in ask(7, most=1)] == [1] * 7


def test_results_become_our_document():
    results = {
        "results": {
            "ours": {"alias": "ours", "score,none": 0.75, "score_stderr,none": 0.25,
                     "wer,none": 12.5, "wer_stderr,none": "N/A", "by_kind,none": {"a": 1}},
            "graded": {"grade,none": np.float64(0.5), "grade_stderr,none": 0.05,
                       "grade_stderr_clt,none": 0.9},
            "sent": {"submission,none": None, "submission_stderr,none": "N/A"},
        },
        "groups": {"all": {"score,none": 0.7, "alias": "all", "score_stderr,none": "N/A"}},
        "group_subtasks": {"all": ["ours", "graded"]},
        "configs": {"ours": {"metric_list": [{"metric": "score"}, {"metric": "wer"}]}},
        "n-samples": {n: {"effective": k} for n, k in (("ours", 4), ("graded", 10), ("sent", 1))},
    }  # fmt: skip
    found = backend.document(results)
    assert set(found) == {"ours", "graded", "sent", "all"}
    ours = found["ours"]
    # sqrt(.75 * .25 / 3) = .25: three right, one wrong
    assert (ours["metric"], ours["value"], ours["n"]) == ("score", 0.75, 4)
    assert ours["ci_method"] == "wilson"
    assert ours["ci"] == pytest.approx([0.3006, 0.9544], abs=1e-4)
    assert ours["metrics"] == {"score": 0.75, "wer": 12.5, "by_kind": None}
    graded = found["graded"]
    assert graded["ci"] == pytest.approx([0.402, 0.598]) and graded["ci_method"] == "normal"
    assert found["sent"]["value"] is None and found["sent"]["ci"] is None
    assert (found["all"]["n"], found["all"]["ci"]) == (14, None)
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("option", [["--fresh"], ["--allow-overlap"], ["--against", "x"]])
def test_options_of_our_own_runner_are_refused(option, capsys):
    command = ["eval", "-c", "tiny-omni-w4a8", "--backend", "lmms-eval", "--task", "mmmu_val"]
    assert app.main([*command, *option]) == 2
    assert option[0] in capsys.readouterr().err


def test_without_lmms_eval_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match="lmms-eval"):
        backend.require()
    command = ["eval", "-c", "tiny-omni-w4a8", "--backend", "lmms-eval", "--task", "mmmu_val"]
    assert app.main([*command, "--json"]) == 3
    error = json.loads(capsys.readouterr().out)["error"]
    assert "masquant[lmms]" in error["hint"]


# From here on with lmms-eval itself.

UTILS = """
import io
import soundfile
from PIL import Image

def picture(doc):
    return [Image.open(io.BytesIO(doc["image"]["bytes"]))]

def sound(doc):
    return [doc["audio"]]

def waveform(doc):
    wave, rate = soundfile.read(io.BytesIO(doc["audio"]["bytes"]))
    return [{"array": wave, "sampling_rate": rate}]

def chat(doc, lmms_eval_specific_kwargs=None):
    wave = waveform(doc)[0]
    content = [{"type": "image", "url": picture(doc)[0]}, {"type": "audio", "url": wave}]
    return [{"role": "user", "content": [*content, {"type": "text", "text": doc["question"]}]}]

def score(doc, results):
    return {"exact": float(results[0].strip().lower() == doc["answer"].strip().lower())}
"""
MESSAGES = "doc_to_messages: !function utils.chat"
METRIC = "metric_list: [{metric: exact, aggregation: mean, higher_is_better: true}]"


@pytest.fixture
def task(tmp_path, monkeypatch):
    """Writes a task's YAML: task(name, data file, lines...) -> its path."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "utils.py").write_text(UTILS)

    def write(name, data, *lines):
        kwargs = f"dataset_kwargs: {{data_files: {{test: {data}}}}}"
        head = (f"task: {name}", "dataset_path: parquet", "dataset_name: default", kwargs)
        path = tmp_path / f"{name}.yaml"
        path.write_text("\n".join([*head, "test_split: test", *lines]) + "\n")
        return str(path)

    return write


def own(*lines):
    return (
        'doc_to_text: "{{question}}"', 'doc_to_target: "{{answer}}"',
        "process_results: !function utils.score", METRIC, *lines,
    )  # fmt: skip


GENERATE = ("output_type: generate_until", "generation_kwargs: {max_new_tokens: 12}")


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """A small W4A8 run's checkpoint."""
    run_dir = tmp_path_factory.mktemp("lmms")
    pipeline.run(small("method=rtn", "export.verify=false"), run_dir)
    return run_dir / "export" / "model"


def ours(tiny, recipe, name, rows):
    """Percent by masquant's own evaluation of the first rows."""
    task = next(t for t in recipe.evaluation.tasks if t.name == name)
    source = task.source.model_copy(update={"shuffle": False})
    task = task.model_copy(update={"samples": rows, "source": source})
    evaluation = recipe.evaluation.model_copy(update={"tasks": (task,), "fidelity_samples": 0})
    words = {"modalities": recipe.modalities, "seed": 0}
    return evaluate(tiny.model, tiny.processor, evaluation, **words)["tasks"][name]["value"]


@needs_lmms
@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("picture", ("doc_to_visual: !function utils.picture",)),
        ("speech", ("doc_to_visual: !function utils.sound",)),
        ("sum", (MESSAGES,)),
        ("text", ()),
    ],
)
def test_its_scores_are_those_of_our_own_evaluation(tiny, task, name, lines):
    file = task(f"local_{name}", DATA / f"eval-{name}.parquet", *own(*GENERATE, *lines))
    folder = str(tiny.path)
    found = backend.evaluate(small(), folder, [file], samples=25)["tasks"][f"local_{name}"]
    assert found["n"] == 25 and found["metric"] == "exact"
    assert found["value"] > 0.5 and found["ci_method"] == "wilson"
    assert 100 * found["value"] == pytest.approx(ours(tiny, small(), name, 25))


@needs_lmms
def test_a_quantized_folder_several_tasks_and_stops(export, task, tmp_path, capsys):
    data = DATA / "eval-transcription.parquet"
    whole = ("doc_to_visual: !function utils.waveform", "output_type: generate_until")
    files = [
        task("whole", data, *own(*whole, "generation_kwargs: {max_new_tokens: 16}")),
        task("cut", data, *own(*whole, 'generation_kwargs: {max_new_tokens: 16, until: [" "]}')),
        task("chat", DATA / "eval-sum.parquet", *own(*GENERATE, MESSAGES)),
    ]  # fmt: skip
    command = ["eval", "-c", "tiny-omni-w4a8", "--backend", "lmms-eval", "--model", str(export)]
    command += ["--run-dir", str(tmp_path / "run"), "--samples", "9", "--json", "-q"]
    assert app.main([*command, *(a for f in files for a in ("--task", f))]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "run" / "eval" / "lmms-eval.json").read_text())
    scores = {name: t["value"] for name, t in found["tasks"].items()}
    assert scores["whole"] > 0.5 and scores["chat"] > 0.5
    assert scores["cut"] == 0  # every transcript has several words
    assert found["backend"].startswith("lmms-eval 0.") and found["model"] == str(export)


@needs_lmms
def test_choices_are_told_by_their_losses(tiny, task):
    """The task's own accuracy and ours, from the losses of every choice."""
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    file = task(
        "choices", DATA / "eval-picture.parquet", "output_type: multiple_choice",
        "doc_to_visual: !function utils.picture", 'doc_to_text: "{{question}}"',
        "doc_to_target: digit", f"doc_to_choice: {json.dumps(words)}",
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]",
    )  # fmt: skip
    found = backend.evaluate(small(), str(tiny.path), [file], samples=12)["tasks"]["choices"]
    task_of = next(t for t in small().evaluation.tasks if t.name == "picture")
    source = task_of.source.model_copy(update={"shuffle": False, "limit": 12})
    hits = 0
    for sample in load_samples(source, seed=0, modalities=("text", "vision", "audio")):
        makes = [lambda s=sample, w=w: with_answer(s, w) for w in words]
        scored = answers.losses(
            tiny.model, tiny.processor, makes, [0] * 10, batch_size=10, progress=NullProgress()
        )
        hits += min(range(10), key=lambda i: scored[i][0]) == sample.row["digit"]
    assert found["value"] == hits / 12 > 0.7


def include(name):
    import lmms_eval.tasks

    return f"include: {Path(lmms_eval.tasks.__file__).parent / name}"


@needs_lmms
def test_the_real_tasks_code_on_data_of_their_schema(tiny, task, tmp_path):
    """OCRBench, ScienceQA, MMMU and LibriSpeech as lmms-eval scores them; random pictures."""
    import datasets

    rng = np.random.default_rng(3)

    def noise(n):
        return [Image.fromarray(rng.integers(0, 255, (56, 84, 3), np.uint8)) for _ in range(n)]

    def save(name, columns, pictures):
        data = datasets.Dataset.from_dict(columns)
        for column in pictures:
            data = data.cast_column(column, datasets.Image())
        data.to_parquet(tmp_path / f"{name}.parquet")
        return tmp_path / f"{name}.parquet"

    ocr = save("ocr", {
        "image": noise(3), "question": ["what is written in the image?"] * 3,
        "answer": [["CENTRE"], ["five"], ["ball"]],
        "dataset": ["IIIT5K", "svt", "HME100k"], "question_type": ["Regular Text Recognition"] * 3,
    }, ["image"])  # fmt: skip
    science = save("science", {
        "image": [*noise(2), None], "hint": ["", "Look.", ""], "question": ["Which?"] * 3,
        "choices": [["a", "b"], ["a", "b", "c"], ["x", "y"]], "answer": [1, 2, 0],
    }, ["image"])  # fmt: skip
    mmmu = save("mmmu", {
        "id": ["validation_Art_1", "validation_Math_2"],
        "question_type": ["multiple-choice", "open"],
        "question": ["See <image 1> and <image 2>.", "What is <image 1>?"],
        "options": ["['a', 'b']", "[]"], "answer": ["B", "5"], "subfield": ["x", "y"],
        **{f"image_{i}": [n, n] if i == 1 else [n, None] if i == 2 else [None, None]
           for i in range(1, 8) for n in noise(1)},
    }, [f"image_{i}" for i in range(1, 8)])  # fmt: skip
    rows = datasets.load_dataset("parquet", data_files=str(DATA / "eval-transcription.parquet"))
    rows = rows["train"].select(range(6))
    speech = save("speech", {
        "audio": rows["audio"], "gt": rows["answer"], "source": ["x"] * 6, "task": ["asr_en"] * 6,
    }, [])  # fmt: skip
    files = [
        task("my_ocr", ocr, include("ocrbench/ocrbench.yaml")),
        task("my_science", science, include("scienceqa/scienceqa_img.yaml")),
        task("my_mmmu", mmmu, include("mmmu/mmmu_val.yaml")),
        task(
            "my_speech",
            speech,
            include("librispeech/librispeech_test_other.yaml"),
            "doc_to_text: Transcribe the digits.",  # what the model was taught to hear
        ),
    ]
    output = tmp_path / "written"
    found = backend.evaluate(small(), str(tiny.path), files, output=output)["tasks"]
    assert (output / "results" / "ocrbench_results.txt").is_file()  # not in the working directory
    assert {name: (t["metric"], t["n"]) for name, t in found.items()} == {
        "my_ocr": ("ocrbench_accuracy", 3), "my_science": ("exact_match", 3),
        "my_mmmu": ("mmmu_acc", 2), "my_speech": ("wer", 6),
    }  # fmt: skip
    assert found["my_science"]["value"] == 0  # the model only knows digits
    assert 0 <= found["my_speech"]["value"] < 30
    assert all(t["value"] is not None for t in found.values())


@needs_lmms
def test_videos_are_read_as_frames(tmp_path):
    av = pytest.importorskip("av", reason="PyAV, which lmms-eval reads videos with, is missing")
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 56, 56, "yuv420p"
        for i in range(9):
            picture = np.full((56, 56, 3), 28 * i, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())
    sample = messages.from_visuals([str(path)], "How many?", **HOW)
    frames = sample.messages[0]["content"][0]["video"]
    brightness = [np.asarray(f).mean() for f in frames]
    assert len(frames) == 4 and brightness == sorted(brightness)
    assert brightness[0] < 10 and brightness[-1] > 210
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    with pytest.raises(RecipeError, match="cannot be decoded"):
        messages.from_visuals([str(broken)], "?", **HOW)


@needs_lmms
def test_lmms_eval_finds_our_classes_by_the_entry_point():
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    from masquant_cli.lmms import manifest
    from masquant_cli.lmms.wrapper import Masquant, MasquantChat

    registry = ModelRegistryV2()
    registry.register_manifest(manifest())
    assert registry.get_model_class("masquant") is MasquantChat
    assert registry.get_model_class("masquant", force_simple=True) is Masquant
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert (
        '[project.entry-points."lmms_eval.models"]\nmasquant = "masquant_cli.lmms:manifest"' in text
    )


@needs_lmms
def test_as_a_plug_in_it_is_made_from_an_argument_string(export):
    from masquant_cli.lmms.wrapper import Masquant

    model = Masquant.create_from_arg_string(
        f"pretrained={export},max_frames=8", {"batch_size": "auto", "device": "cpu"}
    )
    assert (model.batch_size, model.max_frames, model.device.type) == (1, 8, "cpu")
    assert model.loaded.model.dtype == torch.float32
    with pytest.raises(RecipeError, match="unknown model_args: use_cache"):
        Masquant(pretrained=str(export), use_cache=True)
    with pytest.raises(RecipeError, match="which model"):
        Masquant()
    asked = SimpleNamespace(args=("a", None, None, 0, "mtvqa", "test"))
    with pytest.raises(RecipeError, match="several rounds"):
        model.generate_until_multi_round([asked])


@needs_lmms
def test_unknown_tasks_missing_data_and_odd_files(tiny, task, tmp_path):
    folder = str(tiny.path)
    with pytest.raises(RecipeError, match="no task 'mmmu_vall'") as caught:
        backend.evaluate(small(), folder, ["mmmu_vall"])
    assert "mmmu_val" in caught.value.hint
    with pytest.raises(RecipeError, match="name the tasks"):
        backend.evaluate(small(), folder, [])
    (tmp_path / "odd.yaml").write_text("- 1")
    with pytest.raises(RecipeError, match="not a file of an lmms-eval task"):
        backend.evaluate(small(), folder, [str(tmp_path / "odd.yaml")])
    with pytest.raises(RecipeError, match="not a file of an lmms-eval task"):
        backend.evaluate(small(), folder, [str(tmp_path / "none.yaml")])
    gone = task("gone", tmp_path / "gone.parquet", *own(*GENERATE))
    with pytest.raises(EnvironmentProblem, match="data cannot be had"):
        backend.evaluate(small(), folder, [gone])
