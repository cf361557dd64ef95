"""The whole line on the embedded model: results, resuming, staleness, and what must be refused."""

import contextlib
import hashlib
import io
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from jobs import Interrupting, small
from masquant_kernels import dispatch
from safetensors.torch import load_file, save_file

from masquant_cli import load_quantized, pipeline, shards
from masquant_cli.errors import ArtifactError, CheckError, EnvironmentProblem, RecipeError
from masquant_cli.models.loading import load_float, read_config
from masquant_cli.models.modality import modality_ids, token_ids_of
from masquant_cli.progress import NullProgress
from masquant_cli.rundir import STAGES, RunDir
from masquant_cli.runtime.context import modality_ids as force_ids
from masquant_cli.stages.job import Job
from masquant_cli.stages.judge import is_quantized
from masquant_cli.stages.probes import load_probes
from masquant_cli.stages.samples import CalibrationSet, choose_samples

NO_VERIFY = "export.verify=false"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished, verified run."""
    run_dir = tmp_path_factory.mktemp("finished")
    summary = pipeline.run(small(), run_dir)
    assert summary["export_dir"] == str(run_dir / "export" / "model")
    return run_dir


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """The finished run, free to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def chosen(job: Job) -> CalibrationSet:
    return choose_samples(job.recipe, job.float, job.progress)


def weights_hash(run_dir: Path) -> str:
    return hashlib.sha256((run_dir / "export/model/model.safetensors").read_bytes()).hexdigest()


def states(recipe, run_dir, **kw) -> dict[str, str]:
    return {s.stage: s.state for s in pipeline.plan(recipe, run_dir, **kw)}


def test_reloaded_logits_match_the_reference_for_every_modality(finished):
    found = json.loads((finished / "export/manifest.json").read_text())["summary"]["verified"]
    assert set(found) == {"text", "vision", "audio", "vision+audio"}
    assert all(error < 1e-5 for error in found.values())


def test_bytes_are_those_promised(finished, tmp_path):
    sizes = json.loads((finished / "export/manifest.json").read_text())["summary"]["bytes"]
    assert sizes["quantized"] <= 0.40 * sizes["float"]
    bare = small("compensation.rank=0", NO_VERIFY)
    done = pipeline.run(bare, tmp_path, reuse=[finished])
    sizes = done["stages"]["export"]["bytes"]
    assert sizes["quantized"] <= 0.27 * sizes["float"]


def test_the_folder_is_complete_and_touches_only_the_decoder_linears(finished):
    folder = finished / "export/model"
    job = Job(small(), Interrupting("", 0))
    source = job.float.path
    assert {p.name for p in source.iterdir()} | {"README.md"} == {p.name for p in folder.iterdir()}
    before, after = load_file(source / "model.safetensors"), load_file(folder / "model.safetensors")
    gone = set(before) - set(after)
    assert len(gone) == 28 and all(k.endswith("_proj.weight") for k in gone)
    for key in set(before) & set(after):
        assert torch.equal(before[key], after[key]), key


def test_exported_site_equals_a_literal_eq_29(finished):
    """In fp64, token by token, from the stages' artifacts and the float weight alone."""
    model = load_quantized(finished / "export/model", dtype=torch.float32)
    job = Job(small(), Interrupting("", 0))
    site = job.layers[1]["mlp_in"]
    scale = shards.load(finished / "smooth/layers/001.safetensors")["mlp_in.scale"].double()
    solved = shards.load(finished / "compensate/layers/001.safetensors")
    x = torch.randn(1, 9, site.in_features, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[0, 0, 1, 1, 2, 0, 2, 1, 0]])
    start = 0
    for name, out in zip(site.linears, site.out_features, strict=True):
        w = job.float.weight(name).double() * scale[0]
        step = w.abs().amax(1, keepdim=True) / 7
        q = solved["mlp_in.weight"][start : start + out]  # GPTQ's, in the scales of the nearest
        assert q.dtype == torch.int8
        assert int(q.abs().max()) <= 7
        w_q = q.double() * step
        expected = []
        for token, m in zip(x[0].double(), ids[0].tolist(), strict=True):
            s = token / scale[m]
            delta = s.abs().max() / 127
            y = (s / delta).round() * delta @ w_q.T
            if m:
                modality = job.recipe.modalities[m]
                a = solved[f"mlp_in.{modality}.lr_a"].double()
                b = solved[f"mlp_in.{modality}.lr_b"].double()[:, start : start + out]
                y = y + s @ a @ b
            expected.append(y)
        expected = torch.stack(expected)
        start += out
        with force_ids(model, ids), torch.no_grad(), dispatch.force("reference"):
            found = model.get_submodule(name)(x)[0].double()
        assert float((found - expected).norm() / expected.norm()) < 1e-5
        with force_ids(model, ids.clamp(max=1)), torch.no_grad():  # audio taken for vision
            wrong = model.get_submodule(name)(x)[0].double()
        assert float((wrong - expected).norm() / expected.norm()) > 1e-2


def test_swapped_modality_scales_are_caught_by_the_export(copied, monkeypatch):
    from masquant_cli.stages import export

    honest = export.export_tensors

    def swapped(site, weights, scale, low_rank, scheme, integers):
        return honest(site, weights, scale[[0, 2, 1]], low_rank, scheme, integers)

    monkeypatch.setattr(export, "export_tensors", swapped)
    shutil.rmtree(copied / "export")
    with pytest.raises(CheckError, match="differ from the reference"):
        pipeline.run(small(), copied)
    assert not (copied / "export/manifest.json").exists()
    assert not (copied / "export/model").exists()


def test_sequential_layers_equal_the_full_forward(finished):
    from masquant_cli.data.inputs import encode
    from masquant_cli.models.capture import embed, run_layer

    job = Job(small(), Interrupting("", 0))
    skeleton, model = job.float, load_float(job.recipe.model).model
    inputs = encode(skeleton.processor, chosen(job).samples[:6], for_generation=False)
    ids = modality_ids(inputs["input_ids"], token_ids_of(model.config), job.recipe.modalities)
    with skeleton.materialised_names(skeleton.names_outside_layers()):
        batch = embed(skeleton, inputs, ids)
    for layer in job.layers:
        with skeleton.materialised(layer.module):
            run_layer(skeleton, layer.layer, batch)
    last = {}
    norm = model.get_decoder().norm
    handle = norm.register_forward_pre_hook(lambda _, args: last.update(x=args[0]))
    with torch.no_grad():
        model(**inputs, use_cache=False)
    handle.remove()
    assert torch.equal(batch.hidden[batch.real], last["x"][batch.real])


def test_calibration_statistics_are_those_of_a_plain_forward(finished):
    """Absmax and count of one site by hooks on an ordinary forward, sample by sample."""
    from masquant_cli.data.inputs import encode

    job = Job(small(), Interrupting("", 0))
    model = load_float(job.recipe.model).model
    site = job.layers[2]["attn_out"]
    absmax, count = torch.zeros(3, site.in_features), torch.zeros(3)
    seen = {}
    handle = model.get_submodule(site.linears[0]).register_forward_pre_hook(
        lambda _, args: seen.update(x=args[0][0])
    )
    for sample in chosen(job).samples:
        inputs = encode(job.float.processor, [sample], for_generation=False)
        with torch.no_grad():
            model(**inputs, use_cache=False)
        ids = modality_ids(inputs["input_ids"], token_ids_of(model.config), job.recipe.modalities)
        for m in range(3):
            mine = seen["x"][ids[0] == m]
            count[m] += len(mine)
            if len(mine):
                absmax[m] = torch.maximum(absmax[m], mine.abs().amax(0))
    handle.remove()
    stored = shards.load(finished / "calibrate/layers/002.safetensors")
    for m, name in enumerate(job.recipe.modalities):
        assert stored[f"attn_out.{name}.count"].item() == count[m]
        torch.testing.assert_close(
            stored[f"attn_out.{name}.absmax"], absmax[m], rtol=1e-3, atol=1e-4
        )


def test_a_second_run_does_nothing_and_changes_go_stale_downstream_only(finished):
    assert set(states(small(), finished).values()) == {"cached"}
    changed = states(small("method=smoothquant"), finished)
    assert changed["calibrate"] == "cached" and changed["smooth"] == "stale"
    changed = states(small("compensation.whiten=false"), finished)
    assert [changed[s] for s in STAGES] == ["cached", "cached", "stale", "stale"]
    changed = states(small("seed=5"), finished)
    assert set(changed.values()) == {"stale"}
    assert states(small("evaluation.batch_size=3"), finished)["export"] == "cached"


def test_a_stale_stage_says_what_changed(finished):
    def why(*overrides):
        return {s.stage: s.why for s in pipeline.plan(small(*overrides), finished)}

    found = why("weights.bits=8")
    assert found["smooth"] == "weights.bits changed: 4 -> 8"
    assert found["export"] == "a stage before it changed"
    assert why("calibration.sources.0.limit=null")["calibrate"].endswith(
        "limit changed: 10 -> null"
    )
    found = why("calibration.rows=64", "seed=5")["calibrate"]
    assert found == "calibration.rows changed: 48 -> 64, and 1 more"


def test_a_stale_export_is_not_judged_as_if_it_were_the_recipe(finished, tmp_path):
    assert pipeline.exported(small("evaluation.batch_size=3"), finished).is_dir()
    with pytest.raises(ArtifactError, match=r"weights\.bits changed: 4 -> 8") as caught:
        pipeline.exported(small("weights.bits=8"), finished)
    assert "--model" in caught.value.hint
    with pytest.raises(RecipeError, match="no finished export"):
        pipeline.exported(small(), tmp_path)


def test_planning_downloads_no_model(tmp_path, monkeypatch):
    asked = []

    def snapshot(name, revision, local_files_only=False, **_):
        asked.append(local_files_only)
        raise LocalEntryNotFoundError("not here")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    steps = pipeline.plan(small("model.path=some/model"), tmp_path, download=False)
    assert asked == [True] and list(tmp_path.iterdir()) == []
    assert {(s.state, s.why) for s in steps} == {("todo", "some/model has yet to be downloaded")}


def test_another_run_may_lend_its_calibration(finished, tmp_path):
    recipe = small("weights.bits=8", NO_VERIFY)
    assert states(recipe, tmp_path)["calibrate"] == "todo"
    assert states(recipe, tmp_path, reuse=[finished])["calibrate"] == "cached"
    assert states(small("seed=5"), tmp_path, reuse=[finished])["calibrate"] == "todo"
    why = pipeline.plan(small("seed=5"), tmp_path, reuse=[finished, tmp_path])[0].why
    assert f"not reused from {finished}: seed changed: 0 -> 5" in why
    assert f"not reused from {tmp_path}: never finished" in why


@pytest.mark.parametrize(
    "stage, after",
    [("embed", 3), ("calibrate", 2), ("smooth", 2), ("compensate", 3), ("export", 1)],
)
def test_interrupted_anywhere_the_same_bytes_come_out(finished, tmp_path, stage, after):
    recipe = small(NO_VERIFY)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(recipe, tmp_path, progress=Interrupting(stage, after))
    done = states(recipe, tmp_path)
    assert "todo" in done.values() and not (tmp_path / "export/model").exists()
    if stage in ("calibrate", "smooth", "compensate"):
        kept = tmp_path / stage / "layers" / "000.safetensors"
        before = kept.stat().st_mtime_ns
    pipeline.run(recipe, tmp_path)
    if stage in ("calibrate", "smooth", "compensate"):
        assert kept.stat().st_mtime_ns == before  # finished layers are not done again
    assert weights_hash(tmp_path) == weights_hash(finished)


def test_a_full_disk_is_one_clear_error_and_leaves_nothing_finished(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def full(*args, **kwargs):
        raise SafetensorError("Error while serializing: No space left on device (os error 28)")

    monkeypatch.setattr(shards, "save_file", full)
    with pytest.raises(EnvironmentProblem, match="disk is full"):
        pipeline.run(small(), tmp_path, until="calibrate")
    assert not (tmp_path / "calibrate/manifest.json").exists()
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize(
    "code, stderr, problem",
    [
        (1, "SafetensorError: No space left on device", "disk is full"),
        (-9, "", "too little memory"),
        (1, "RuntimeError: DefaultCPUAllocator: can't allocate memory", "too little memory"),
        (1, "MemoryError", "too little memory"),
    ],
)
def test_verification_that_the_machine_stops(copied, monkeypatch, code, stderr, problem):
    from masquant_cli.stages import export

    process = SimpleNamespace(stdin=io.StringIO(), poll=lambda: code, returncode=code)
    died = SimpleNamespace(process=process, said=io.StringIO(stderr))
    monkeypatch.setattr(export, "fresh_process", lambda job: contextlib.nullcontext(died))
    shutil.rmtree(copied / "export")
    with pytest.raises(EnvironmentProblem, match=problem):
        pipeline.run(small(), copied)
    assert not (copied / "export/model").exists()


def test_a_verification_that_never_began_says_so(copied, monkeypatch):
    """A child that is gone before it is asked: its pipe breaks, which is not what went wrong."""
    shutil.rmtree(copied / "export")
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(CheckError, match="does not load in a fresh process: no output"):
        pipeline.run(small(), copied)


def flip(path: Path) -> None:
    """Change the last byte: same size, same header, other content."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 0xFF
    path.write_bytes(data)


def test_a_changed_shard_is_refused(copied):
    flip(copied / "calibrate/layers/001.safetensors")
    shutil.rmtree(copied / "smooth")
    with pytest.raises(ArtifactError, match="changed after") as caught:
        pipeline.run(small(), copied)
    assert "001.safetensors" in caught.value.where and caught.value.exit_code == 4


@pytest.mark.parametrize("damage", ["truncated", "gone"])
def test_a_damaged_stage_is_done_again_without_its_damage(finished, copied, damage):
    path = copied / "smooth/layers/002.safetensors"
    flip(copied / "smooth/layers/001.safetensors")
    path.write_bytes(path.read_bytes()[:-9]) if damage == "truncated" else path.unlink()
    assert states(small(), copied)["smooth"] == "stale"
    pipeline.run(small(), copied)
    for layer in ("001", "002"):
        name = f"smooth/layers/{layer}.safetensors"
        assert (copied / name).read_bytes() == (finished / name).read_bytes()


def test_a_changed_export_is_not_believed(copied):
    flip(copied / "export/model/model.safetensors")
    assert states(small(), copied)["export"] == "stale"


def test_a_failed_export_keeps_the_one_before_under_another_name(copied, monkeypatch):
    from masquant_cli.stages import export

    before = weights_hash(copied)

    def fails(*args):
        raise CheckError("no")

    monkeypatch.setattr(export, "verify", fails)
    monkeypatch.setattr(export, "fresh_process", lambda job: contextlib.nullcontext(True))
    with pytest.raises(CheckError):
        pipeline.run(small("name=another"), copied)
    assert not (copied / "export/model").exists()
    (copied / "export/model.previous").rename(copied / "export/model")
    assert weights_hash(copied) == before
    monkeypatch.undo()
    pipeline.run(small("name=another", NO_VERIFY), copied)
    assert weights_hash(copied) == before
    assert {p.name for p in (copied / "export").iterdir()} == {"model", "manifest.json"}


def test_asking_for_verification_later_verifies(finished, tmp_path):
    pipeline.run(small(NO_VERIFY), tmp_path, reuse=[finished])
    assert states(small(NO_VERIFY), tmp_path)["export"] == "cached"
    step = pipeline.plan(small(), tmp_path)[-1]
    assert (step.state, step.why) == ("stale", "it was written without being verified")


def test_a_verified_export_stays_good_until_more_is_asked_of_it(copied):
    for recipe in (small(NO_VERIFY), small("export.tolerance=0.5")):
        assert states(recipe, copied)["export"] == "cached"
    manifest = json.loads((copied / "export/manifest.json").read_text())
    manifest["summary"]["verified"]["vision"] = 3e-4
    (copied / "export/manifest.json").write_text(json.dumps(manifest))
    assert states(small(), copied)["export"] == "cached"
    step = pipeline.plan(small("export.tolerance=1e-4"), copied)[-1]
    assert (step.state, step.why) == ("stale", "its logits are verified to 3.0e-04 only")


def test_the_model_and_the_data_are_in_the_fingerprint(model_copy, tmp_path):
    table = tmp_path / "rows.jsonl"
    rows = [{"question": f"what is {i}?", "answer": "a digit"} for i in range(9)]
    table.write_text("\n".join(map(json.dumps, rows)))
    recipe = small(f"model.path={model_copy}", f"calibration.sources.3.dataset={table}")
    before = {s.stage: s.fingerprint for s in pipeline.plan(recipe, tmp_path / "run")}
    for path in (table, model_copy / "model.safetensors", model_copy / "tokenizer.json"):
        flip(path)
        after = {s.stage: s.fingerprint for s in pipeline.plan(recipe, tmp_path / "run")}
        assert not set(before.values()) & set(after.values()), path
        before = after


def test_two_processes_cannot_share_a_run(tmp_path):
    with RunDir(tmp_path).lock(), pytest.raises(ArtifactError, match="another masquant"):
        pipeline.run(small(), tmp_path)


def test_a_modality_without_samples_is_refused(tmp_path):
    recipe = small()
    text = [s for s in recipe.calibration.sources if s.dataset.endswith("text")]
    calibration = recipe.calibration.model_copy(update={"sources": tuple(text)})
    only_text = recipe.model_copy(update={"calibration": calibration})
    with pytest.raises(RecipeError, match="no calibration sample has"):
        pipeline.run(only_text, tmp_path, until="calibrate")


def test_a_group_size_that_does_not_divide(tmp_path):
    with pytest.raises(RecipeError, match="group_size 96 does not divide"):
        pipeline.run(small("weights.group_size=96"), tmp_path, until="calibrate")


@pytest.fixture
def model_copy(tmp_path) -> Path:
    from masquant_cli.models.resolve import resolve

    return Path(shutil.copytree(resolve(small().model), tmp_path / "model"))


def test_nan_in_a_weight(model_copy, tmp_path):
    file = model_copy / "model.safetensors"
    tensors = load_file(file)
    name = next(k for k in tensors if k.endswith("1.mlp.up_proj.weight"))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(RecipeError, match="NaN or infinity"):
        pipeline.run(small(f"model.path={model_copy}"), tmp_path / "run")


def test_activations_that_overflow(model_copy, tmp_path):
    file = model_copy / "model.safetensors"
    tensors = load_file(file)
    name = next(k for k in tensors if k.endswith("1.mlp.up_proj.weight"))
    tensors[name] *= 3e38
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(RecipeError, match="activations entering"):
        pipeline.run(small(f"model.path={model_copy}"), tmp_path / "run", until="calibrate")


def test_a_checkpoint_that_lacks_a_tensor(model_copy, tmp_path):
    file = model_copy / "model.safetensors"
    tensors = load_file(file)
    del tensors[next(k for k in tensors if k.endswith("1.mlp.up_proj.weight"))]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(RecipeError, match="lacks 1 tensors"):
        pipeline.run(small(f"model.path={model_copy}"), tmp_path / "run")


def test_a_truncated_checkpoint_and_a_config_that_is_no_mapping(model_copy, tmp_path):
    file = model_copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(RecipeError, match="weights cannot be loaded"):
        pipeline.run(small(f"model.path={model_copy}"), tmp_path / "run")
    (model_copy / "config.json").write_text("[]")
    with pytest.raises(RecipeError, match="not a mapping"):
        pipeline.run(small(f"model.path={model_copy}"), tmp_path / "run")
    with pytest.raises(RecipeError, match="not a model folder"):
        is_quantized(model_copy)
    (model_copy / "config.json").write_text('{"quantization_config": null}')
    assert not is_quantized(model_copy)


def test_a_model_folder_without_its_tokenizer(model_copy, tmp_path):
    (model_copy / "tokenizer.json").unlink()
    with pytest.raises(RecipeError, match="tokenizer has no vocabulary"):
        pipeline.run(small(f"model.path={model_copy}"), tmp_path / "run")


def test_a_model_folder_with_a_damaged_tokenizer(model_copy, tmp_path):
    (model_copy / "tokenizer.json").write_text('{"model": {"type": "BPE"')
    with pytest.raises(RecipeError, match="processor cannot be loaded: ") as caught:
        pipeline.run(small(f"model.path={model_copy}"), tmp_path / "run")
    assert "\n" not in caught.value.message
    (model_copy / "tokenizer.json").write_text('{"model": {"type": "None"}}')
    with pytest.raises(RecipeError, match="processor cannot be loaded: "):
        pipeline.run(small(f"model.path={model_copy}"), tmp_path / "run")


def test_an_unsupported_family_and_a_quantized_checkpoint(finished, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(RecipeError, match="not supported yet"):
        pipeline.run(small(f"model.path={tmp_path}"), tmp_path / "run")
    with pytest.raises(RecipeError, match="already quantized"):
        pipeline.run(small(f"model.path={finished / 'export/model'}"), tmp_path / "run")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"quantization_config": "gptq"}, r"already quantized \(gptq\)"),
        ({"compression_config": {"quant_method": "x"}}, r"already quantized \(x\)"),
        ({"text_config": {"quantization_config": {}}, "thinker_config": {
            "quantization_config": {"bits": 4}}}, r"already quantized \(\?\)"),
        ({"model_type": "qwen2", "num_hidden_layers": 3, "layer_types": ["full_attention"]},
         "does not accept this configuration: .*num_hidden_layers"),
        ({"model_type": "mamba", "layer_types": []}, "does not accept this configuration"),
    ],
)  # fmt: skip
def test_configurations_that_cannot_be_started_from(tmp_path, config, expected):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match=expected):
        read_config(tmp_path)


def test_a_missing_folder_and_a_hub_out_of_reach(tmp_path, monkeypatch):
    with pytest.raises(RecipeError, match="no such model folder"):
        pipeline.run(small("model.path=./nowhere"), tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(EnvironmentProblem, match="hub cannot be reached"):
        pipeline.run(small("model.path=someone/unheard-of-model"), tmp_path)


@pytest.mark.parametrize(
    "recipe",
    [
        small("method=rtn", base="tiny-omni-w8a8"),
        small("method=smoothquant", base="tiny-omni-w4a4"),
        small(base="tiny-omni-w4a16"),
        small("weights.group_size=64", "method=masquant", "compensation.whiten=false"),
    ],
    ids=["rtn-w8a8", "smoothquant-w4a4", "masquant-w4a16", "paper-groups"],
)
def test_bits_methods_and_groups_export_and_answer(finished, tmp_path, recipe):
    recipe = recipe.model_copy(update={"name": "any"})
    done = pipeline.run(
        recipe.model_copy(update={"export": recipe.export.model_copy(update={"verify": False})}),
        tmp_path,
        reuse=[finished],
    )
    assert done["stages"]["calibrate"]["state"] == "cached"
    from masquant_cli.stages.reference import reference_logits

    job = Job(recipe, Interrupting("", 0))
    for stage in STAGES:
        folder = Path(done["stages"][stage]["folder"])
        from masquant_cli.rundir import read_manifest

        job.finished[stage] = (folder, read_manifest(folder))
    model = load_quantized(done["export_dir"], dtype=torch.float32)
    probes, tokens = load_probes(job), token_ids_of(model.config)
    ids = {k: modality_ids(p["input_ids"], tokens, recipe.modalities) for k, p in probes.items()}
    every = {k: torch.arange(i.numel()) for k, i in ids.items()}
    for kind, expected in reference_logits(job, job.float, probes, ids, every).items():
        inputs = probes[kind]
        with torch.no_grad(), dispatch.force("reference"):
            found = model(**inputs, use_cache=False).logits[0]
        assert float((found - expected).norm() / expected.norm()) < 1e-5, kind


def test_token_quotas_stop_each_modality_on_its_own():
    quota = "calibration.tokens={text: 60, vision: 13, audio: 40}"
    limited = chosen(Job(small(quota), Interrupting("", 0)))
    free = chosen(Job(small(), Interrupting("", 0)))
    pictures = [s for s in limited.samples if s.media("image")]
    assert len(pictures) == 4  # four tokens each: the fourth passes thirteen
    assert 40 <= limited.tokens["audio"] < free.tokens["audio"]
    assert len(limited.samples) < len(free.samples) and limited.digest != free.digest


def test_a_limit_of_memory_that_was_not_kept_is_said(finished, tmp_path):
    class Told(NullProgress):
        warnings = ()

        def warn(self, message):
            self.warnings = (*self.warnings, message)

    for limit, count in (("1MB", 1), ("900GB", 0)):
        told, recipe = Told(), small("method=rtn", f"resources.max_memory={limit}")
        run_dir = tmp_path / limit
        done = pipeline.run(recipe, run_dir, until="smooth", reuse=[finished], progress=told)
        assert len(told.warnings) == count
        took = f"smooth took {done['stages']['smooth']['peak_bytes'] / 1e9:.1f} GB of memory"
        assert all(took in w and "max_memory is 1MB" in w for w in told.warnings)
