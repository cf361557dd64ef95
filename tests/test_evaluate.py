"""Tasks, fidelity and bench against slow, literal versions of themselves."""

import copy
import io
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import tiny_chat
import torch
from PIL import Image
from tiny_quantized import quantized, scheme_of

from masquant_cli.data.inputs import encode, encode_scored, model_inputs
from masquant_cli.data.text import normalise
from masquant_cli.errors import CheckError, RecipeError
from masquant_cli.models.modality import modality_ids
from masquant_cli.recipe import Bench, Evaluation, Source, Task
from masquant_cli.runtime import modality_ids as stated
from masquant_cli.runtime.mas_linear import MasLinear, MasSite
from masquant_cli.stages import evaluate as stage
from masquant_cli.stages import prepare as preparing
from masquant_cli.stages.bench import bench, prompt
from masquant_cli.stages.fidelity import draw, fidelity
from masquant_cli.stages.prepare import Waiting, task_samples

MODALITIES = ("text", "vision", "audio")


@pytest.fixture(scope="module")
def processor():
    return tiny_chat.processor()


@pytest.fixture(scope="module")
def model():
    return tiny_chat.omni()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Ten rows with a question, a picture, a sound and an answer, of growing length."""
    generator, rows = np.random.default_rng(0), {k: [] for k in ("q", "a", "image", "audio")}
    for i in range(10):
        rows["q"].append(f"number {i}" + " please" * (i % 4))
        rows["a"].append(f"  Answer {i}. ")
        pixels = generator.integers(0, 256, (28, 28 * (1 + i % 2), 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        rows["image"].append(buffer.getvalue())
        buffer = io.BytesIO()
        wave = generator.standard_normal(1600 * (2 + i % 3)).astype(np.float32) * 0.1
        soundfile.write(buffer, wave, 16000, format="WAV")
        rows["audio"].append(buffer.getvalue())
    path = tmp_path_factory.mktemp("data") / "rows.parquet"
    pq.write_table(pa.table(rows), path)
    return path


def task(data, metric="accuracy", parts=("q",), name="t", **settings) -> Task:
    content = [{"text": "{q}"} if part == "q" else {part: part} for part in parts]
    messages = [{"role": "user", "content": content}]
    if metric == "perplexity":
        messages.append({"role": "assistant", "content": [{"text": "{a}"}]})
    source = {"dataset": str(data), "messages": messages, **settings.pop("source", {})}
    settings = {"answer": None if metric == "perplexity" else "{a}", **settings}
    return Task(name=name, metric=metric, source=Source(**source), **settings)


def prepare(task, processor, batch_size=4, seed=0):
    return stage.prepare(task, processor, modalities=MODALITIES, seed=seed, batch_size=batch_size)


class Scripted(torch.nn.Module):
    """Answers a prompt from a table instead of thinking."""

    def __init__(self, processor, answers: dict[str, str]):
        super().__init__()
        self.tokenizer, self.answers = processor.tokenizer, answers
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.generation_config = SimpleNamespace(eos_token_id=1, pad_token_id=0)

    def forward(self, input_ids, attention_mask): ...

    def generate(self, input_ids, attention_mask, max_new_tokens, **_):
        prompts = self.tokenizer.batch_decode(input_ids, skip_special_tokens=True)
        said = [next(a for q, a in self.answers.items() if q in prompt) for prompt in prompts]
        new = self.tokenizer(said, padding=True, padding_side="right", return_tensors="pt")
        return torch.cat([input_ids, new["input_ids"]], 1)


# --- scores


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("  Seven. ", "seven"),
        ("SEVEN!", "seven"),
        ("don't  stop", "dont stop"),
        ("a-b, (c)", "a b c"),
        ("-5", "-5"),
        ("1,000.5.", "1,000.5"),
        ("３\n４", "3 4"),
        ("?", "?"),
        ("", ""),
    ],
)
def test_normalise(text, normal):
    assert normalise(text) == normal


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_accuracy_is_exact_match_after_normalising(data, processor, batch_size):
    answers = {f"number {i}": f"ANSWER  {i}!" for i in range(8)}
    answers |= {"number 8": "answer", "number 9": "answer nine"}
    prepared = prepare(task(data), processor, batch_size)
    assert len(prepared.parts) == math.ceil(10 / batch_size)
    model = Scripted(processor, answers)
    result = stage.score(model, processor, prepared, predictions=True)
    assert (result["metric"], result["value"], result["n"]) == ("accuracy", 80.0, 10)
    assert result["ci"] == pytest.approx([49.016, 94.331], abs=1e-2)
    for row in result["predictions"]:  # batching by length must not mix the answers up
        number = row["expected"].removeprefix("Answer ").removesuffix(".")
        assert row["predicted"] == answers[f"number {number}"].strip()
    assert "predictions" not in stage.score(model, processor, prepared)


def test_wer_is_of_the_corpus_not_a_mean_of_rates(data, processor):
    wanted = task(data, "wer", answer="answer {a}", samples=4, source={"shuffle": False})
    answers = {f"number {i}": f"answer answer {i}" for i in range(10)}
    answers["number 1"] = "answer 1 1 1"  # one substitution, one insertion
    answers["number 2"] = ""  # three deletions
    result = stage.score(Scripted(processor, answers), processor, prepare(wanted, processor))
    assert result["value"] == pytest.approx(100 * (2 + 3) / 12)
    assert result["n"] == 4
    low, high = result["ci"]
    assert low <= result["value"] <= high <= 100
    assert result["ci_method"] == "bootstrap"


def test_generation_matches_a_loop_without_cache_or_padding(data, processor, model):
    for parts in (("q",), ("image", "q"), ("q", "audio"), ("image", "audio", "q")):
        wanted = task(data, parts=parts, max_new_tokens=5, samples=6)
        result = stage.score(model, processor, prepare(wanted, processor), predictions=True)
        samples = task_samples(wanted, modalities=MODALITIES, seed=0)
        for sample, row in zip(samples, result["predictions"], strict=True):
            batch, said = model_inputs(model, encode(processor, [sample], for_generation=True)), []
            while len(said) < 5 and (not said or said[-1] != processor.tokenizer.eos_token_id):
                with torch.no_grad():
                    token = model(**batch, use_cache=False).logits[:, -1:].argmax(-1)
                said.append(int(token))
                batch["input_ids"] = torch.cat([batch["input_ids"], token], 1)
                batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            text = processor.tokenizer.decode(said, skip_special_tokens=True).strip()
            assert (row["key"], row["predicted"]) == (sample.key, text)


def test_the_checkpoints_own_generation_settings_do_not_count(data, processor, model):
    prepared = prepare(task(data, max_new_tokens=8), processor)
    plain = stage.score(model, processor, prepared, predictions=True)
    opinionated = copy.deepcopy(model).train()
    config = opinionated.generation_config
    config.update(repetition_penalty=5.0, do_sample=True, temperature=9.0, num_beams=2)
    assert stage.score(opinionated, processor, prepared, predictions=True) == plain
    assert opinionated.generation_config is config
    assert opinionated.training


def test_perplexity_is_over_the_answers_tokens(data, processor, model):
    wanted = task(data, "perplexity", parts=("image", "q"), samples=5)
    result = stage.score(model, processor, prepare(wanted, processor, batch_size=2))
    nats = []
    for sample in task_samples(wanted, modalities=MODALITIES, seed=0):
        batch = encode(processor, [sample], for_generation=False)
        tail = processor.tokenizer(f"{sample.row['a']}<|im_end|>")["input_ids"]
        ids = batch["input_ids"][0]
        assert ids[-len(tail) - 1 : -1].tolist() == tail  # a newline ends the template
        with torch.no_grad():
            logs = model(**model_inputs(model, batch)).logits[0].log_softmax(-1)
        at = range(len(ids) - 1 - len(tail), len(ids) - 1)
        nats += [-float(logs[i - 1, ids[i]]) for i in at]
    assert result["tokens"] == len(nats)
    assert result["value"] == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-4)
    assert result["ci"][0] <= result["value"] <= result["ci"][1]


def test_perplexity_of_plain_text_needs_no_assistant(data, processor, model):
    made = task(data, "perplexity")
    source = made.source.model_copy(update={"messages": made.source.messages[:1]})
    made = made.model_copy(update={"source": source})
    result = stage.score(model, processor, prepare(made, processor))
    assert result["n"] == 10
    assert math.isfinite(result["value"])


@pytest.mark.parametrize("metric", ["accuracy", "wer", "perplexity"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_fail_the_task_by_name(data, processor, model, metric, value):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.lm_head.weight[7] = value
    prepared = prepare(task(data, metric, name="my-task", samples=2), processor)
    with pytest.raises(CheckError, match="NaN or infinity") as caught:
        stage.score(broken, processor, prepared)
    assert caught.value.where == "task my-task"


def test_answers_that_are_missing_or_empty(data, processor, tmp_path):
    with pytest.raises(RecipeError, match="no column 'b'"):
        prepare(task(data, answer="{b}"), processor)
    pq.write_table(pa.table({"q": ["x"], "a": [" "]}), tmp_path / "e.parquet")
    with pytest.raises(RecipeError, match="expected answer is empty") as caught:
        prepare(task(tmp_path / "e.parquet", name="t"), processor)
    assert caught.value.where.endswith("row 0")


def test_evaluate_reuses_prepared_tasks(data, processor, model, monkeypatch):
    tasks = (task(data, name="one", samples=3), task(data, "perplexity", name="two", samples=2))
    settings = Evaluation(tasks=tasks, batch_size=2, fidelity_samples=0)
    words = {"modalities": MODALITIES, "seed": 0}
    prepared = stage.prepare_all(settings, processor, **words)
    first = stage.evaluate(model, processor, settings, **words)
    monkeypatch.setattr(preparing, "load_samples", None)
    again = stage.evaluate(model, processor, settings, **words, prepared=prepared)
    assert again == first
    assert list(first) == ["tasks"]
    assert {name: r["n"] for name, r in first["tasks"].items()} == {"one": 3, "two": 2}


@pytest.mark.parametrize("metric", ["accuracy", "perplexity"])
def test_tasks_larger_than_memory_score_the_same(data, processor, model, metric):
    wanted = task(data, metric, parts=("image", "audio", "q"))
    words = {"modalities": MODALITIES, "seed": 0, "batch_size": 4}
    small = preparing.prepare(wanted, processor, **words, keep_bytes=20_000)
    waiting = [part for part in small.parts if isinstance(part, Waiting)]
    assert 0 < len(waiting) < len(small.parts)
    assert not any(sample.messages for part in waiting for sample in part.samples)
    whole = preparing.prepare(wanted, processor, **words)
    scores = [stage.score(model, processor, made) for made in (small, whole)]
    assert scores[0] == scores[1]


# --- fidelity


@pytest.fixture(scope="module")
def small(model):
    """The model at W4A8 with made-up scales and low-rank factors."""
    return quantized(model, scheme_of(model, rank=3))


def remember(seen, key, _module, args, output):
    seen[key] = args[0], output


def settings_for(data, *parts, **fields) -> Evaluation:
    tasks = [task(data, parts=p, name=f"t{i}") for i, p in enumerate(parts)]
    return Evaluation(tasks=tasks, **{"fidelity_samples": 8, "batch_size": 3, **fields})


def test_fidelity_matches_one_sample_at_a_time(data, processor, model, small):
    settings = settings_for(data, ("q",), ("image", "q"), ("q", "audio"), ("audio", "image"))
    words = {"modalities": MODALITIES, "seed": 0}
    result = fidelity(model, small, processor, settings, **words)

    linears = {n: m for n, m in small.named_modules() if isinstance(m, MasLinear)}
    assert len(linears) == 14
    sums = {n: torch.zeros(3, 2, dtype=torch.float64) for n in [*linears, "lm_head"]}
    kl, flips = {m: [] for m in MODALITIES}, {m: [] for m in MODALITIES}
    for sample in draw(settings, **words):
        batch, scored = encode_scored(processor, [sample])
        ids = modality_ids(batch["input_ids"], model.config, MODALITIES)
        seen = {}
        hooks = [
            made.get_submodule(name).register_forward_hook(
                partial(remember, seen, (made is small, name))
            )
            for made in (model, small)
            for name in [*linears, "lm_head"]
        ]
        with torch.no_grad():
            logits, other = (m(**model_inputs(m, batch)).logits[0] for m in (model, small))
            for hook in hooks:
                hook.remove()
            for name, sum_ in sums.items():
                x, y = seen[False, name]
                if name == "lm_head":
                    y, y_q = x, seen[True, name][0]
                else:
                    with stated(small, ids):
                        y_q = linears[name](x)
                for m in range(3):
                    pick = ids == m
                    sum_[m, 0] += y[pick].double().square().sum()
                    sum_[m, 1] += (y[pick] - y_q[pick]).double().square().sum()
        kinds = [n for k, n in (("image", "vision"), ("audio", "audio")) if sample.media(k)]
        for t in scored[0].nonzero().flatten().tolist():
            p, q = logits[t - 1].log_softmax(-1), other[t - 1].log_softmax(-1)
            for name in kinds or ["text"]:
                kl[name].append(float((p.exp() * (p - q)).sum()))
                flips[name].append(int(p.argmax() != q.argmax()))
    decibel = {n: 10 * torch.log10(s[:, 0] / s[:, 1]) for n, s in sums.items()}
    local = torch.stack([decibel[n] for n in linears]).mean(0)
    for i, name in enumerate(MODALITIES):
        assert result["sqnr_db"][name] == pytest.approx(float(local[i]), abs=0.01)
        assert result["sqnr_end_db"][name] == pytest.approx(float(decibel["lm_head"][i]), abs=0.01)
        by_linear = {n: found[name] for n, found in result["sqnr_db_by_linear"].items()}
        assert by_linear == pytest.approx({n: float(decibel[n][i]) for n in linears}, abs=0.01)
        assert result["kl"][name] == pytest.approx(np.mean(kl[name]), rel=1e-3)
        assert result["flip_rate"][name] == pytest.approx(np.mean(flips[name]))
    # Four tasks in turn, two samples of each; the last task counts under both.
    assert result["fidelity_n"] == {"text": 2, "vision": 4, "audio": 4}


def test_swapped_modality_scales_show_where_they_hurt(data, processor, model, small):
    settings = settings_for(data, ("image", "q"), ("audio", "q"))
    words = {"modalities": MODALITIES, "seed": 0}
    right = fidelity(model, small, processor, settings, **words)["sqnr_db"]
    wrong = copy.deepcopy(small)
    for module in wrong.modules():
        if isinstance(module, MasSite):
            module.smooth_inv[[1, 2]] = module.smooth_inv[[2, 1]]
    swapped = fidelity(model, wrong, processor, settings, **words)["sqnr_db"]
    assert swapped["text"] == right["text"]
    assert swapped["vision"] != right["vision"]
    assert swapped["audio"] != right["audio"]


def test_the_recipes_order_of_modalities_need_not_be_the_exports(data, processor, model, small):
    settings = settings_for(data, ("image", "q"), ("audio", "q"))
    right = fidelity(model, small, processor, settings, modalities=MODALITIES, seed=0)
    order = ("text", "audio", "vision")
    other = fidelity(model, small, processor, settings, modalities=order, seed=0)
    for key in ("sqnr_db", "sqnr_end_db", "kl", "flip_rate", "fidelity_n"):
        assert other[key] == right[key], key
    with pytest.raises(CheckError, match="quantized for text, vision, audio, the recipe has text"):
        fidelity(model, small, processor, settings_for(data, ("q",)), modalities=("text",), seed=0)


def test_a_nearly_lossless_model_is_nearly_faithful(data, processor, model):
    scheme = scheme_of(model, rank=0, weight_bits=8, activation_bits=16)
    settings = settings_for(data, ("image", "q"), fidelity_samples=4)
    fine = quantized(model, scheme)
    # The made-up scales of the other modalities do not fit the stored weight: use the base's.
    for module in fine.modules():
        if isinstance(module, MasSite):
            module.smooth_inv[1:] = module.smooth_inv[0]
    result = fidelity(model, fine, processor, settings, modalities=MODALITIES, seed=0)
    assert result["sqnr_db"]["text"] > 35
    assert result["sqnr_db"]["vision"] > 35
    assert result["kl"]["vision"] < 0.01


def test_modalities_without_tokens_are_none(data, processor, model, small):
    result = fidelity(
        model, small, processor, settings_for(data, ("q",)), modalities=MODALITIES, seed=0
    )
    for key in ("sqnr_db", "sqnr_end_db", "kl", "flip_rate"):
        assert result[key]["text"] is not None
        assert result[key]["vision"] is result[key]["audio"] is None
    for found in result["sqnr_db_by_linear"].values():
        assert found["text"] is not None and found["vision"] is found["audio"] is None


def test_evaluate_adds_fidelity_given_the_float_model(data, processor, model, small):
    settings = settings_for(data, ("q",), fidelity_samples=2)
    words = {"modalities": MODALITIES, "seed": 0}
    result = stage.evaluate(small, processor, settings, **words, float_model=model)
    assert set(result["sqnr_db"]) == set(MODALITIES)
    with pytest.raises(CheckError, match="no quantized linear"):
        stage.evaluate(model, processor, settings, **words, float_model=model)
    broken = copy.deepcopy(small)
    with torch.no_grad():
        broken.lm_head.weight.fill_(math.nan)
    with pytest.raises(CheckError, match="NaN") as caught:
        fidelity(model, broken, processor, settings, **words)
    assert caught.value.where == "the quantized model"


def test_fidelity_draws_from_the_tasks_in_turn(data):
    settings = Evaluation(
        tasks=[
            task(data, name="a", source={"limit": 1}),
            task(data, name="b", parts=("image", "q")),
        ],
        fidelity_samples=5,
    )
    drawn = draw(settings, modalities=MODALITIES, seed=0)
    assert [bool(s.media("image")) for s in drawn] == [False, True, True, True, True]
    assert all(s.messages[-1]["role"] == "assistant" for s in drawn)


# --- bench


def test_bench_reports_both_models(data, processor, model, small):
    settings = Bench(prompt_tokens=40, new_tokens=2, batch_size=2, repeats=3)
    wanted = task(data, parts=("image", "audio", "q"), samples=1)
    (sample,) = task_samples(wanted, modalities=MODALITIES, seed=0)
    result = bench(model, small, processor, settings, sample=sample)
    for phase in ("prefill", "decode"):
        part = result[phase]
        assert len(part["float"]["all_seconds"]) == 3
        seconds = {name: part[name]["seconds"] for name in ("float", "quantized")}
        assert seconds["quantized"] in part["quantized"]["all_seconds"]
        assert part["speedup"] == pytest.approx(seconds["float"] / seconds["quantized"])
    slower = result["prefill"]["speedup"] < 1
    assert ("SLOWER" in result["verdict"][0]) == slower
    assert 0 <= result["argmax_agreement"] <= 1
    linears = {n: m for n, m in small.named_modules() if isinstance(m, MasLinear)}
    took = result["weight_bytes"]
    before = sum(4 * model.get_submodule(n).weight.numel() for n in linears)
    after = sum(
        tensor.nbytes
        for module in small.modules()
        if isinstance(module, MasLinear | MasSite)
        for name, tensor in module.state_dict().items()
        if name != "bias"
    )
    assert (took["float"], took["quantized"], took["float_dtype"]) == (before, after, "float32")
    assert took["ratio"] == pytest.approx(after / before)
    assert took["ratio_bf16"] == pytest.approx(2 * took["ratio"])


def test_bench_prompt_is_as_long_as_asked_and_ends_in_the_sample(data, processor):
    wanted = task(data, parts=("image", "q"), samples=1)
    (sample,) = task_samples(wanted, modalities=MODALITIES, seed=0)
    alone = encode(processor, [sample], for_generation=True)["input_ids"][0]
    batch = prompt(processor, Bench(prompt_tokens=100, batch_size=3), sample=sample)
    assert batch["input_ids"].shape == (3, 100)
    assert batch["input_ids"][2, -len(alone) :].tolist() == alone.tolist()
    assert bool(batch["attention_mask"].all())
    text = prompt(processor, Bench(prompt_tokens=5, batch_size=1))
    assert set(text) == {"input_ids", "attention_mask"}
    assert int(text["input_ids"].max()) < 256  # no special token by chance


def test_bench_refuses_to_time_a_broken_model(processor, model, small):
    broken = copy.deepcopy(small)
    with torch.no_grad():
        broken.lm_head.weight[3] = math.nan
    with pytest.raises(CheckError, match="NaN") as caught:
        bench(model, broken, processor, Bench(prompt_tokens=4, new_tokens=1, repeats=1))
    assert caught.value.where == "the quantized model"
