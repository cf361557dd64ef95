"""Any Hugging Face data set to chat samples to model inputs, failing paths included."""

import io
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import tiny_chat
import torch
from PIL import Image

from masquant_cli.data import sources
from masquant_cli.data.audio import decode_audio
from masquant_cli.data.inputs import encode, encode_scored, with_answer
from masquant_cli.data.samples import Sample, load_samples
from masquant_cli.data.text import columns_in, fill
from masquant_cli.errors import EnvironmentProblem, RecipeError
from masquant_cli.recipe import Source

MODALITIES = ("text", "vision", "audio")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    import datasets

    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder))
    # A courtesy to pyarrow's threads that would cost each streamed test five seconds.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


def png(colour: int, size=(28, 28)) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def noise() -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def wav(seconds: float = 0.3, rate: int = 8000, channels: int = 1) -> bytes:
    tone = np.sin(np.arange(int(seconds * rate)) / rate * 2 * np.pi * 440).astype(np.float32)
    buffer = io.BytesIO()
    soundfile.write(buffer, np.stack([tone] * channels, 1) * 0.5, rate, format="WAV")
    return buffer.getvalue()


def parquet(file, **columns):
    pq.write_table(pa.table(columns), file)
    return file


def source(dataset, *parts, **settings) -> Source:
    content = list(parts) or [{"text": "{n}"}]
    messages = [{"role": "user", "content": content}]
    return Source(dataset=str(dataset), messages=messages, **settings)


def texts(samples) -> list[str]:
    return [sample.messages[0]["content"][0]["text"] for sample in samples]


def load(made: Source, seed: int = 0, modalities=MODALITIES) -> list[Sample]:
    return list(load_samples(made, seed=seed, modalities=modalities))


@pytest.fixture
def numbers(tmp_path):
    return parquet(
        tmp_path / "n.parquet", n=list(range(10)), kind=["even", "odd"] * 5, who=["a b"] * 10
    )


# --- text templates


def test_fill_puts_columns_and_literal_braces():
    row = {"a": "x", "n": 3, "list": ["p", 2], "with space": 0.5}
    assert fill("{a} {n} {{a}} {list} { with space }", row, "here") == "x 3 {a} p, 2 0.5"
    assert columns_in("{a}{{b}}{ c }", "here") == ["a", "c"]


@pytest.mark.parametrize(
    ("template", "message", "hint"),
    [
        ("{quesion}", "no column 'quesion'", "did you mean 'question'"),
        ("{question.upper}", "no column 'question.upper'", "plain columns only"),
        ("{question[0]}", "no column", "plain columns only"),
        ("{question!r}", "no column", "plain columns only"),
        ("{question:>9}", "no column", "plain columns only"),
        ("{}", "empty {}", "column name"),
        ("{question", "unbalanced brace", "double a brace"),
        ("a } b", "unbalanced brace", "double a brace"),
        ("{blank}", "column 'blank' is empty", "where"),
        ("{nested}", "holds dict", "text template"),
    ],
)
def test_fill_refuses(template, message, hint):
    row = {"question": "q", "blank": None, "nested": {"a": 1}}
    with pytest.raises(RecipeError, match=message) as caught:
        fill(template, row, "dataset d, row 4")
    assert hint in caught.value.hint
    assert caught.value.where == "dataset d, row 4"


# --- rows


def test_order_is_seeded_and_limited(numbers):
    every = texts(load(source(numbers), seed=1))
    assert sorted(every, key=int) == [str(i) for i in range(10)]
    assert every == texts(load(source(numbers), seed=1))
    assert every != texts(load(source(numbers), seed=2))
    assert texts(load(source(numbers, limit=3), seed=1)) == every[:3]
    assert texts(load(source(numbers, shuffle=False, limit=2))) == ["0", "1"]


def test_where_keeps_equal_rows_before_the_limit(numbers):
    odd = load(source(numbers, where={"kind": "odd"}, limit=4))
    assert len(odd) == 4
    assert all(int(text) % 2 for text in texts(odd))
    assert texts(load(source(numbers, where={"n": 7}))) == ["7"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "json", "csv"])
def test_formats_give_the_same_rows(tmp_path, suffix, streaming):
    rows = [{"n": i, "word": f"w{i}"} for i in range(5)]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        parquet(path, n=[r["n"] for r in rows], word=[r["word"] for r in rows])
    elif suffix == "csv":
        path.write_text("n,word\n" + "".join(f"{r['n']},{r['word']}\n" for r in rows))
    else:
        lines = [json.dumps(r) for r in rows]
        path.write_text("\n".join(lines) if suffix == "jsonl" else f"[{','.join(lines)}]")
    made = source(path, {"text": "{n}:{word}"}, streaming=streaming)
    assert sorted(texts(load(made))) == [f"{i}:w{i}" for i in range(5)]


def test_folder_splits(tmp_path):
    parquet(tmp_path / "train-00000.parquet", n=[1, 2])
    parquet(tmp_path / "test-00000.parquet", n=[3])
    assert texts(load(source(tmp_path, split="test"))) == ["3"]
    assert len(load(source(tmp_path, split="train[:1]"))) == 1
    with pytest.raises(RecipeError, match="no split 'dev'") as caught:
        load(source(tmp_path, split="dev"))
    assert "train" in caught.value.hint and "test" in caught.value.hint


def test_nothing_is_printed_and_the_working_directory_stays_clean(tmp_path, monkeypatch, capfd):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    (tmp_path / "d.jsonl").write_text('{"n": 1}\n')
    load(source(tmp_path / "d.jsonl"))
    assert capfd.readouterr() == ("", "")
    assert os.listdir() == []


@pytest.mark.parametrize("streaming", [False, True])
def test_an_unwritable_cache_is_replaced(tmp_path, monkeypatch, streaming):
    import datasets

    (tmp_path / "d.jsonl").write_text('{"n": 1}\n')
    # A file where the folder should be cannot be written even by root.
    (tmp_path / "blocked").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "blocked/cache"))
    assert texts(load(source(tmp_path / "d.jsonl", streaming=streaming))) == ["1"]


def test_imagefolder_labels_are_names(tmp_path):
    for label, colour in (("cat", 10), ("dog", 200)):
        (tmp_path / label).mkdir()
        (tmp_path / label / "x.png").write_bytes(png(colour))
    made = source(f"imagefolder:{tmp_path}", {"text": "{label}"}, {"image": "image"})
    samples = load(made)
    assert sorted(texts(samples)) == ["cat", "dog"]
    by_name = {s.row["label"]: s.media("image")[0] for s in samples}
    assert by_name["dog"].mode == "RGB"
    assert by_name["dog"].getpixel((0, 0)) == (200, 200, 200)
    only = source(f"imagefolder:{tmp_path}", {"image": "image"}, where={"label": "dog"})
    assert [s.row["label"] for s in load(only)] == ["dog"]


def test_audiofolder_with_metadata_and_splits(tmp_path):
    folder = tmp_path / "test"
    folder.mkdir()
    (folder / "x.wav").write_bytes(wav(0.5, 8000))
    (folder / "metadata.csv").write_text("file_name,said\nx.wav,one two\n")
    made = source(f"audiofolder:{tmp_path}", {"text": "{said}"}, {"audio": "audio"}, split="test")
    (sample,) = load(made)
    (wave,) = sample.media("audio")
    assert wave.dtype == np.float32
    assert wave.shape == (8000,)  # half a second at 16 kHz
    assert texts([sample]) == ["one two"]
    with pytest.raises(RecipeError, match="no split 'train'") as caught:
        load(source(f"audiofolder:{tmp_path}", {"audio": "audio"}))
    assert "test" in caught.value.hint
    (folder / "metadata.csv").write_text("name,said\nx.wav,one\n")
    with pytest.raises(RecipeError, match="no `file_name` column"):
        load(made)
    with pytest.raises(RecipeError, match="no image files"):
        (folder / "metadata.csv").unlink()
        load(source(f"imagefolder:{tmp_path}", {"image": "image"}, split="test"))


# --- errors of sources, one each


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("/nowhere/x.parquet", "does not exist"),
        ("./nowhere", "does not exist"),
        ("missing.jsonl", "does not exist"),
        ("imagefolder:/nowhere", "does not exist"),
        ("builtin:tiny-omni/nothing", "no such built-in"),
    ],
)
def test_missing_data_is_refused(dataset, message):
    with pytest.raises(RecipeError, match=message) as caught:
        load(source(dataset))
    assert dataset in caught.value.where


def test_wrong_columns_name_the_right_ones(numbers):
    for made in (
        source(numbers, {"text": "{nn}"}),
        source(numbers, {"image": "nn"}),
        source(numbers, where={"nn": 1}),
        source(numbers, {"text": "{nn}"}, streaming=True),
    ):
        with pytest.raises(RecipeError, match="no column 'nn'") as caught:
            load(made)
        assert "'n'" in caught.value.hint
        assert "kind, n, who" in caught.value.hint


def test_no_matching_row_shows_what_is_there(numbers):
    with pytest.raises(RecipeError, match="no row") as caught:
        load(source(numbers, where={"kind": "both"}))
    assert "kind holds 'even', 'odd'" in caught.value.hint


def test_empty_split_and_single_file_split(tmp_path, numbers):
    parquet(tmp_path / "empty.parquet", n=pa.array([], pa.int64()))
    with pytest.raises(RecipeError, match="has no rows"):
        load(source(tmp_path / "empty.parquet"))
    for name in ("empty.json", "empty.jsonl"):
        (tmp_path / name).write_text("[]" if name == "empty.json" else "")
        with pytest.raises(RecipeError, match="has no rows"):
            load(source(tmp_path / name))
    with pytest.raises(RecipeError, match="no split 'test'") as caught:
        load(source(numbers, split="test"))
    assert "single file" in caught.value.hint


def test_broken_and_mixed_files_are_refused(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"not parquet")
    (tmp_path / "bad.txt").write_text("x")
    (tmp_path / "mixed").mkdir()
    parquet(tmp_path / "mixed/train-0.parquet", n=[1])
    parquet(tmp_path / "mixed/train-1.parquet", other=["x"])
    (tmp_path / "none").mkdir()
    for name, message in (
        ("bad.parquet", "cannot be read"),
        ("bad.txt", "not a data file"),
        ("mixed", "cannot be read"),
        ("none", "no data files"),
    ):
        with pytest.raises(RecipeError, match=message):
            load(source(tmp_path / name))


def test_hub_errors_become_ours(monkeypatch):
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    raised = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: (_ for _ in ()).throw(raised[0]))
    for error, kind, message in (
        (ConnectionError("Couldn't reach 'a/b' on the Hub"), EnvironmentProblem, "reached"),
        (DatasetNotFoundError("Dataset 'a/b' doesn't exist"), RecipeError, "does not exist"),
        (
            ValueError("BuilderConfig 'x' not found. Available: ['p', 'q']"),
            RecipeError,
            "no subset",
        ),
        (OSError(28, "No space left on device"), EnvironmentProblem, "disk is full"),
        (ImportError("no module torchcodec"), EnvironmentProblem, "missing"),
    ):
        raised[:] = [error]
        with pytest.raises(kind, match=message) as caught:
            load(source("a/b"))
        assert caught.value.where == "dataset a/b"
    assert caught.value.exit_code == 3


def test_a_modality_the_recipe_lacks_is_refused(tmp_path):
    path = parquet(tmp_path / "i.parquet", image=[png(1)])
    with pytest.raises(RecipeError, match="use image") as caught:
        load(source(path, {"image": "image"}), modalities=("text", "audio"))
    assert "'vision'" in caught.value.hint


# --- media


def test_every_way_to_store_an_image(tmp_path):
    (tmp_path / "pics").mkdir()
    (tmp_path / "pics/a.png").write_bytes(png(77))
    stored = {
        "bytes": [png(77)],
        "struct": [{"bytes": png(77), "path": None}],
        "path": ["pics/a.png"],
        "struct_path": [{"bytes": None, "path": str(tmp_path / "pics/a.png")}],
        "many": [[png(77), png(77)]],
    }
    path = parquet(tmp_path / "i.parquet", **stored)
    for column in stored:
        (sample,) = load(source(path, {"image": column}))
        images = sample.media("image")
        assert len(images) == (2 if column == "many" else 1)
        assert all(i.mode == "RGB" and i.getpixel((5, 5)) == (77, 77, 77) for i in images)


def test_hugging_face_features_are_not_decoded_by_datasets(tmp_path):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "audio": datasets.Audio()})
    rows = {
        "image": [{"bytes": png(9), "path": None}],
        "audio": [{"bytes": wav(), "path": None}],
    }
    made = datasets.Dataset.from_dict(
        rows,
        features=datasets.Features(
            {k: {"bytes": datasets.Value("binary"), "path": datasets.Value("string")} for k in rows}
        ),
    )
    table = made.data.table.replace_schema_metadata(features.arrow_schema.metadata)
    pq.write_table(table, tmp_path / "f.parquet")
    for streaming in (False, True):
        parts = [{"image": "image"}, {"audio": "audio"}]
        (sample,) = load(source(tmp_path / "f.parquet", *parts, streaming=streaming))
        assert sample.media("image")[0].size == (28, 28)
        assert sample.media("audio")[0].shape == (4800,)


def test_transparency_becomes_white():
    from masquant_cli.data.media import decode_image

    image = decode_image(Image.new("RGBA", (4, 4), (255, 0, 0, 0)), None, "here")
    assert image.getpixel((0, 0)) == (255, 255, 255)


def test_audio_is_mono_at_16_khz():
    stereo = decode_audio(wav(0.25, 44100, channels=2), None, "here")
    assert stereo.shape == (4000,)
    assert 0.4 < np.abs(stereo).max() < 0.6
    array = {"array": np.zeros(100), "sampling_rate": 16000}
    assert decode_audio(array, None, "here").shape == (100,)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("image", b"not an image", "image cannot be decoded"),
        ("image", noise()[:1000], "image cannot be decoded"),
        ("audio", b"not audio", "audio cannot be decoded"),
        ("audio", wav(0.0), "no samples"),
    ],
    ids=["image", "truncated image", "audio", "empty audio"],
)
def test_bad_media_names_the_row(tmp_path, column, value, message):
    good = png(1) if column == "image" else wav()
    path = parquet(tmp_path / "m.parquet", **{column: [good, value]})
    with pytest.raises(RecipeError, match=message) as caught:
        load(source(path, {column: column}, shuffle=False))
    assert caught.value.where.endswith("row 1")
    assert "BytesIO" not in caught.value.message


def test_a_bad_media_file_is_named(tmp_path):
    (tmp_path / "bad.bin").write_bytes(b"neither")
    path = parquet(tmp_path / "m.parquet", image=["bad.bin"], audio=["bad.bin"])
    for kind in ("image", "audio"):
        with pytest.raises(RecipeError, match=rf"the {kind} bad\.bin cannot be decoded"):
            load(source(path, {kind: kind}))


def test_missing_media_files_and_empty_cells(tmp_path):
    path = parquet(tmp_path / "m.parquet", image=["gone.png", None])
    with pytest.raises(RecipeError, match=r"gone\.png does not exist") as caught:
        load(source(path, {"image": "image"}, shuffle=False))
    assert str(tmp_path) in caught.value.hint
    path = parquet(tmp_path / "m.parquet", image=pa.array([None], pa.string()))
    with pytest.raises(RecipeError, match="image column is empty"):
        load(source(path, {"image": "image"}))


def test_keys_follow_content(tmp_path):
    path = parquet(tmp_path / "k.parquet", image=[png(1), png(1), png(2)], q=["a", "a", "a"])
    keys = [s.key for s in load(source(path, {"text": "{q}"}, {"image": "image"}, shuffle=False))]
    assert keys[0] == keys[1] != keys[2]


# --- inputs


@pytest.fixture(scope="module")
def processor():
    return tiny_chat.processor()


def text(value):
    return {"type": "text", "text": value}


def image(width=28, height=28):
    return {"type": "image", "image": Image.new("RGB", (width, height), "red")}


def audio(samples=4000):
    wave = np.random.default_rng(0).standard_normal(samples).astype(np.float32)
    return {"type": "audio", "audio": wave}


def chat(*parts, answer=None) -> Sample:
    messages = [{"role": "user", "content": list(parts)}]
    sample = Sample(messages, {}, "key", "dataset d, row 3")
    return sample if answer is None else with_answer(sample, answer)


def test_mixed_batch_equals_its_rows_one_by_one(processor):
    samples = [
        chat(image(), text("what?")),
        chat(text("hello there")),
        chat(text("hear"), audio(3000)),
        chat(image(56, 28), audio(), image(28, 56), text("x")),
    ]
    batch = encode(processor, samples, for_generation=True)
    alone = [encode(processor, [sample], for_generation=True) for sample in samples]
    width = batch["input_ids"].shape[1]
    for row, one in enumerate(alone):
        pad = width - one["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][row, pad:], one["input_ids"][0])
        assert batch["attention_mask"][row].tolist() == [0] * pad + [1] * (width - pad)
    for name in ("pixel_values", "image_grid_thw", "input_features"):
        parts = [one[name] for one in alone if name in one]
        assert torch.equal(batch[name], torch.cat(parts))
    assert all(isinstance(value, torch.Tensor) for value in batch.values())


def test_generation_drops_the_answer_and_adds_the_prompt(processor):
    decode = processor.tokenizer.decode
    sample = chat(text("q"), answer=" yes ")
    asked = decode(encode(processor, [sample], for_generation=True)["input_ids"][0])
    assert asked == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    whole = decode(encode(processor, [sample], for_generation=False)["input_ids"][0])
    assert whole == asked + " yes <|im_end|>\n"


def test_scored_tokens_are_the_answer_and_its_end(processor):
    samples = [
        chat(image(), text("q"), answer="yes"),
        chat(text("a longer question"), answer=" no "),
        chat(text("abc")),
    ]
    batch, mask = encode_scored(processor, samples)
    scored = [
        processor.tokenizer.decode(ids[m]) for ids, m in zip(batch["input_ids"], mask, strict=True)
    ]
    assert scored == ["yes<|im_end|>", " no <|im_end|>", "user\nabc\n"]
    with pytest.raises(RecipeError, match="what to score"):
        late = {"role": "user", "content": [text("more")]}
        encode_scored(processor, [Sample([*samples[0].messages, late], {}, "k")])


def test_media_that_would_be_dropped_is_an_error():
    deaf = tiny_chat.TEMPLATE.replace("<|audio_bos|><|AUDIO|><|audio_eos|>", "")
    processor = tiny_chat.processor(deaf)
    with pytest.raises(RecipeError) as caught:
        encode(processor, [chat(audio(), text("x"))], for_generation=True)
    assert caught.value.where == "dataset d, row 3"


def test_media_that_a_processor_swallows_is_an_error(processor):
    class Careless:  # takes anything, expands nothing
        tokenizer, image_processor = processor.tokenizer, processor.image_processor
        chat_template = "{% for m in messages %}{{ m['content'][-1]['text'] }}{% endfor %}"

        def apply_chat_template(self, messages, **_):
            return messages[0]["content"][-1]["text"]

        def __call__(self, text, images, **kwargs):
            return self.tokenizer(text, **kwargs)

    with pytest.raises(RecipeError, match="would not see them") as caught:
        encode(Careless(), [chat(image(), text("x"))], for_generation=True)
    assert caught.value.where == "dataset d, row 3"


def test_placeholders_inside_text_are_refused(processor):
    for samples in (
        [chat(text("see <|IMAGE|>"))],
        [chat(image(), text("ok")), chat(text("see <|IMAGE|>"))],
    ):
        with pytest.raises(RecipeError):
            encode(processor, samples, for_generation=True)


def test_a_processor_without_the_modality_says_so(processor):
    frames = [Image.new("RGB", (28, 28))] * 2
    with pytest.raises(RecipeError, match="cannot take video"):
        encode(processor, [chat({"type": "video", "video": frames})], for_generation=True)


def test_templates_that_fail_or_are_missing():
    strict = "{{ raise_exception('no such role') }}"
    with pytest.raises(RecipeError, match="no such role") as caught:
        encode(tiny_chat.processor(strict), [chat(text("x"))], for_generation=True)
    assert "user" in caught.value.hint
    bare = tiny_chat.tokenizer()
    bare.chat_template = None
    with pytest.raises(RecipeError, match="no chat template"):
        encode(bare, [chat(text("x"))], for_generation=True)


def test_a_text_model_takes_its_tokenizer_and_string_contents():
    template = "{% for m in messages %}{{ m['role'] + ':' + m['content'] }}{% endfor %}"
    tokenizer = tiny_chat.tokenizer(template)
    batch = encode(tokenizer, [chat(text("a"), text("b")), chat(text("c"))], for_generation=True)
    assert tokenizer.decode(batch["input_ids"][0]) == "user:ab"
    assert sources.where_of(source("a/b", subset="s")) == "dataset a/b/s"
