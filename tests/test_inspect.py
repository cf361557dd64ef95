"""inspect: numbers by hand, on a small run and on a folder written here; one error per damage."""

import json
import shutil

import numpy as np
import pytest
from jobs import small
from safetensors.numpy import save_file

from masquant_cli import pipeline
from masquant_cli.cli import app
from masquant_cli.errors import ArtifactError, RecipeError
from masquant_cli.inspect import inspect
from masquant_cli.rundir import read_manifest

WEIGHTS = 4 * (256 * 512 + 256 * 256 + 256 * 1536 + 768 * 256)  # of tiny-omni's decoder linears
RECIPE = (
    "method=text-scales", "weights.group_size=64", "weights.symmetric=false",
    "compensation.rank=5", "compensation.sites=[attn_in, mlp_out]", "smoothing.learn=false",
    "export.verify=false",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("inspect") / "run"
    pipeline.run(small(*RECIPE), run_dir)
    return run_dir


@pytest.fixture
def run_dir(finished, tmp_path):
    """A copy that a test may break."""
    return shutil.copytree(finished, tmp_path / "run")


def test_bytes_and_bits_of_a_checkpoint_are_what_paper_and_pencil_give(finished):
    found = inspect(str(finished / "export" / "model"))
    integers, scales, zeros = WEIGHTS // 2, WEIGHTS // 64 * 4, WEIGHTS // 64
    smoothing = 4 * 3 * (256 + 256 + 256 + 768) * 4  # layers x modalities x channels x fp32
    stored = integers + scales + zeros + smoothing
    attn_in, mlp_out = 2 * 5 * (256 + 512) * 2, 2 * 5 * (768 + 256) * 2  # modalities, rank, fp16
    low_rank = 4 * (attn_in + mlp_out)
    assert found["kind"] == "checkpoint"
    assert found["weights_in_linears"] == WEIGHTS == 3_145_728
    assert found["bytes"]["quantized_linears"] == stored == 1_892_352
    assert found["bytes"]["low_rank"] == low_rank == 143_360
    assert found["bits_per_weight"]["without_low_rank"] == 4.8125
    assert found["bits_per_weight"]["with_low_rank"] == 8 * (stored + low_rank) / WEIGHTS
    # All else is as in the float model, which is BF16 throughout.
    original = inspect("builtin:tiny-omni")
    assert found["bytes"]["other"] == original["bytes"]["total"] - 2 * WEIGHTS
    assert found["bytes"]["total"] == stored + low_rank + found["bytes"]["other"]
    file = finished / "export" / "model" / "model.safetensors"
    assert found["bytes"]["files"] == file.stat().st_size > found["bytes"]["total"]
    manifest = read_manifest(finished / "export").summary["bytes"]
    assert manifest["quantized"] == stored + low_rank
    assert manifest["total"] == found["bytes"]["total"]


def test_what_a_checkpoint_is(finished):
    found = inspect(str(finished / "export" / "model"))
    assert (found["bits"], found["layers"], found["linears"]) == ("W4A8", 4, 28)
    assert found["weights"] == {"bits": 4, "group_size": 64, "symmetric": False}
    assert found["ranks"] == {"attn_in": 5, "attn_out": 0, "mlp_in": 0, "mlp_out": 5}
    assert found["modalities"] == ["text", "vision", "audio"]
    site = found["sites"]["attn_in"]
    assert site["linears"] == ["q_proj", "k_proj", "v_proj"]
    assert (site["in"], site["out"], site["weights"]) == (256, [256, 128, 128], 4 * 256 * 512)
    assert site["bytes"] == 4 * (256 * 512 // 2 + 256 * 512 // 64 * 5 + 3 * 256 * 4)
    assert site["low_rank_bytes"] == 4 * 15360 and not found["sites"]["mlp_in"]["low_rank_bytes"]
    sites = found["sites"].values()
    sums = [sum(s[key] for s in sites) for key in ("weights", "bytes", "low_rank_bytes")]
    stored = found["bytes"]
    assert sums == [WEIGHTS, stored["quantized_linears"], stored["low_rank"]]
    assert found["provenance"]["recipe"] == "tiny-omni-w4a8"
    assert found["provenance"]["fingerprint"] == read_manifest(finished / "export").fingerprint
    assert found["dtypes"]["I8"] == {"tensors": 56, "bytes": WEIGHTS // 2 + WEIGHTS // 64}


def test_a_copy_of_a_checkpoint_has_no_provenance(finished, tmp_path):
    shutil.copytree(finished / "export" / "model", tmp_path / "model")
    assert inspect(str(tmp_path / "model"))["provenance"] is None


def test_a_run_says_what_it_is_and_what_it_cost(finished):
    found = inspect(str(finished))
    manifests = {s: read_manifest(finished / s) for s in found["stages"]}
    assert (found["kind"], found["method"], found["bits"]) == ("run", "text-scales", "W4A8")
    assert found["compensation"]["rank"] == 5
    for name, stage in found["stages"].items():
        assert (stage["state"], stage["why"]) == ("finished", "")
        assert stage["seconds"] == manifests[name].seconds > 0
        assert stage["peak_bytes"] == manifests[name].peak_bytes > 1e6
    assert found["seconds"] == sum(m.seconds for m in manifests.values())
    assert found["peak_bytes"] == max(m.peak_bytes for m in manifests.values())
    assert found["stages"]["smooth"]["layers"] == 4
    origin = found["provenance"]
    assert origin["model"] == "builtin:tiny-omni" and origin["seed"] == 0
    assert origin["data"] == manifests["calibrate"].summary["data"]
    assert len(origin["data_files"]) == 4 and len(origin["model_files"]) == 64
    assert origin["versions"]["masquant"] and set(origin["fingerprints"]) == set(manifests)
    assert found["checkpoint"]["bits_per_weight"]["without_low_rank"] == 4.8125
    assert found["evaluation"] is None
    json.dumps(found, allow_nan=False)


def test_a_run_shows_its_evaluation(run_dir):
    tasks = {"sum": {"metric": "accuracy", "value": 50.0, "n": 4, "ci": [9.5, 90.5]}}
    (run_dir / "eval").mkdir()
    file = run_dir / "eval" / "result.json"
    file.write_text(json.dumps({"tasks": tasks, "model_fingerprint": "abc"}))
    found = inspect(str(run_dir))["evaluation"]
    assert found["tasks"] == tasks and found["model_fingerprint"] == "abc"
    file.write_text('{"tasks"')
    with pytest.raises(ArtifactError, match="evaluation cannot be read"):
        inspect(str(run_dir))


def test_states_of_stages_are_told_from_the_files(run_dir):
    def states():
        return {name: (s["state"], s["why"]) for name, s in inspect(str(run_dir))["stages"].items()}

    recipe = json.loads((run_dir / "recipe.json").read_text())
    changed = {**recipe, "weights": {**recipe["weights"], "bits": 8, "symmetric": True}}
    (run_dir / "recipe.json").write_text(json.dumps(changed))
    assert states()["smooth"] == ("stale", "the run's recipe has another weights")
    assert states()["compensate"][0] == "finished"
    (run_dir / "recipe.json").write_text(json.dumps(recipe))
    (run_dir / "compensate" / "layers" / "001.safetensors").unlink()
    lost = "its output layers/001.safetensors is gone or was changed"
    assert states()["compensate"] == ("stale", lost)
    (run_dir / "smooth" / "manifest.json").unlink()
    assert states()["smooth"] == ("unfinished", "interrupted, or failed")
    shutil.rmtree(run_dir / "export")
    assert states()["export"] == ("absent", "")
    found = inspect(str(run_dir))
    assert found["checkpoint"] is None and found["stages"]["smooth"]["seconds"] is None


def test_a_stage_done_again_makes_the_next_one_stale(run_dir):
    manifest = json.loads((run_dir / "smooth" / "manifest.json").read_text())
    manifest["outputs"]["layers/000.safetensors"] = "0" * 64
    (run_dir / "smooth" / "manifest.json").write_text(json.dumps(manifest))
    found = inspect(str(run_dir))["stages"]
    assert found["compensate"]["why"] == "the smooth stage was done again after it"
    assert found["smooth"]["state"] == "finished"  # of the same size


def test_a_calibration_from_elsewhere(run_dir):
    shutil.rmtree(run_dir / "calibrate")
    found = inspect(str(run_dir))
    assert found["stages"]["calibrate"]["why"] == "reused from another run"
    assert found["provenance"]["data"] is None and found["stages"]["smooth"]["state"] == "finished"


def test_a_run_without_a_recipe_is_told_from_its_manifests(run_dir):
    (run_dir / "recipe.json").unlink()
    found = inspect(str(run_dir))
    assert found["kind"] == "run" and found["recipe"] is None
    assert found["provenance"]["recipe"] == "tiny-omni-w4a8"


def test_a_stage(finished):
    found = inspect(str(finished / "smooth"))
    assert (found["kind"], found["stage"], found["state"]) == ("stage", "smooth", "finished")
    assert [f["name"] for f in found["files"]] == [f"layers/00{i}.safetensors" for i in range(4)]
    assert found["reads"]["method"] == "text-scales"


def test_shards_of_stages(finished, run_dir):
    found = inspect(str(finished / "calibrate" / "layers" / "003.safetensors"))
    manifest = read_manifest(finished / "calibrate")
    assert (found["stage"], found["layer"], found["finished"]) == ("calibrate", 3, True)
    assert found["tokens"] == manifest.summary["tokens"]
    gram = next(t for t in found["tensors"] if t["name"] == "mlp_in.audio.gram")
    assert gram == {"name": gram["name"], "dtype": "F32", "shape": [256, 256], "bytes": 4 * 65536}
    assert found["bytes"]["total"] == sum(t["bytes"] for t in found["tensors"])
    found = inspect(str(finished / "compensate" / "layers" / "000.safetensors"))
    assert found["ranks"] == {
        f"{site}.{m}": 5 for site in ("attn_in", "mlp_out") for m in ("audio", "vision")
    }
    assert found["notes"]["attn_in.audio"]["rank"] == 5
    (run_dir / "smooth" / "manifest.json").unlink()
    assert inspect(str(run_dir / "smooth" / "layers" / "000.safetensors"))["finished"] is False


def test_recipes_by_name_and_by_file(tmp_path):
    found = inspect("tiny-omni-w4a8")
    assert (found["kind"], found["name"], found["bits"]) == ("recipe", "tiny-omni-w4a8", "W4A8")
    assert found["tasks"]["transcription"] == "wer" and found["recipe"]["bench"]["repeats"]
    assert found["model"]["files"]["bytes"]["linears"] == 2 * WEIGHTS
    file = tmp_path / "mine.yaml"
    file.write_text("extends: tiny-omni-w4a8\nname: mine\nmodel: {path: some/where}\nmethod: rtn\n")
    found = inspect(str(file))
    assert (found["name"], found["method"], found["model"]["files"]) == ("mine", "rtn", None)


# A folder written by hand: `in` is no multiple of 128, sites in two shards, one modality more.
SCHEME = {
    "quant_method": "masquant", "format_version": 1,
    "weights": {"bits": 4, "group_size": 33, "symmetric": True}, "activations": {"bits": 6},
    "modalities": ["text", "vision"], "base_modality": "text", "token_ids": {"vision": [7]},
    "ranks": {"mlp_out": 3}, "sites": ["mlp_out"],
    "packing": {"layout": "nibble-block", "block": 128},
}  # fmt: skip


def tensors(layer: int) -> dict[str, np.ndarray]:
    at = f"model.layers.{layer}.mlp"
    return {
        f"{at}.mlp_out.smooth_inv": np.ones((2, 66), np.float32),
        f"{at}.mlp_out.lr_a": np.ones((1, 66, 3), np.float16),
        f"{at}.down_proj.weight_packed": np.zeros((5, 64), np.int8),
        f"{at}.down_proj.weight_scale": np.ones((5, 2), np.float32),
        f"{at}.down_proj.lr_b": np.ones((1, 3, 5), np.float16),
        f"{at}.down_proj.bias": np.zeros(5, np.float16),
    }


@pytest.fixture
def by_hand(tmp_path):
    """(folder, function that writes its shards anew from one dict per layer)"""
    config = {"model_type": "llama", "num_hidden_layers": 2, "quantization_config": SCHEME}
    (tmp_path / "config.json").write_text(json.dumps(config))

    def write(*layers):
        names = [f"model-{i}.safetensors" for i in range(len(layers))]
        for name, held in zip(names, layers, strict=True):
            save_file(held, tmp_path / name)
        index = {key: name for name, held in zip(names, layers, strict=True) for key in held}
        text = json.dumps({"weight_map": index})
        (tmp_path / "model.safetensors.index.json").write_text(text)

    write(tensors(0), tensors(1))
    return tmp_path, write


def test_shards_and_odd_widths_by_hand(by_hand):
    folder, _write = by_hand
    (folder / "consolidated.safetensors").write_bytes(b"not of this model")
    found = inspect(str(folder))
    stored, low_rank = 2 * 66 * 4 + 5 * 64 + 5 * 2 * 4, 66 * 3 * 2 + 3 * 5 * 2
    assert found["bytes"]["quantized_linears"] == 2 * stored
    assert found["bytes"]["low_rank"] == 2 * low_rank
    assert found["bytes"]["other"] == 2 * 10
    assert found["weights_in_linears"] == 2 * 5 * 66
    assert found["bits_per_weight"]["without_low_rank"] == 8 * stored / 330
    assert [f["tensors"] for f in found["files"]] == [6, 6]
    assert found["sites"]["mlp_out"]["low_rank_bytes"] == 2 * low_rank


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ("mlp_out.smooth_inv", "smooth_inv is missing"),
        ("down_proj.weight_scale", "weight_scale is missing"),
        ("down_proj.lr_b", "lr_b is missing"),
        ("down_proj.weight_packed", "layer 1 has no quantized linear"),
    ],
)
def test_a_checkpoint_that_lacks_a_tensor(by_hand, lost, said):
    folder, write = by_hand
    held = tensors(1)
    del held[f"model.layers.1.mlp.{lost}"]
    write(tensors(0), held)
    with pytest.raises(ArtifactError, match=said):
        inspect(str(folder))


def test_a_checkpoint_with_a_tensor_of_another_shape_or_a_missing_shard(by_hand):
    folder, write = by_hand
    key = "model.layers.0.mlp.down_proj.weight_packed"
    write({**tensors(0), key: np.zeros((5, 33), np.int8)}, tensors(1))
    with pytest.raises(ArtifactError, match=r"shape \[5, 33\], expected \[5, 64\]"):
        inspect(str(folder))
    write(tensors(0), tensors(1))
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"shard model-1.safetensors is missing"):
        inspect(str(folder))


def test_a_float_folder_counts_only_its_decoder(tmp_path):
    def linear(name):
        return {f"{name}.weight": np.zeros((6, 4), np.float16)}

    names = ("thinker.model.layers.0", "thinker.audio_tower.layers.0", "talker.model.layers.0")
    held = {k: v for n in names for k, v in linear(f"{n}.self_attn.q_proj").items()}
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_omni", "thinker_config": {}}')
    save_file(held, tmp_path / "model.safetensors")
    found = inspect(str(tmp_path))
    assert (found["kind"], found["supported"]) == ("model", True)
    assert (found["linears"], found["weights_in_linears"]) == (1, 24)
    assert found["bytes"]["linears"] == 48 and found["bytes"]["other"] == 96
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(RecipeError, match=r"it holds no \*.safetensors"):
        inspect(str(tmp_path))


def test_every_kind_has_a_table(finished, capsys):
    shown = {
        "tiny-omni-w4a8": "masquant-joint",
        "builtin:tiny-omni": "3,145,728 weights",
        str(finished): "4.812, 5.177 with low rank",
        str(finished / "calibrate"): "calibrate",
        str(finished / "export" / "model"): "4.812, 5.177 with low rank",
        str(finished / "compensate" / "layers" / "000.safetensors"): "mlp_out.audio.lr_b",
        str(finished / "export" / "model" / "model.safetensors"): "143 kB",
    }
    for path, text in shown.items():
        assert app.main(["inspect", path]) == 0
        assert text in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "path", "code", "said"),
    [
        (None, "nowhere/at-all", 2, "nothing at this path"),
        (None, "nowhere.safetensors", 2, "no such file"),
        (None, "tiny-omni-w4a9", 2, "nothing at this path"),
        ("empty", "", 2, "neither a run nor a model"),
        ("cut", "run/smooth/layers/002.safetensors", 4, "not a whole safetensors file"),
        ("cut", "run/export/model/model.safetensors", 4, "not a whole safetensors file"),
        ("cut", "run/export/model", 4, "not a whole safetensors file"),
        ("header", "run/smooth/layers/002.safetensors", 4, "not a whole safetensors file"),
        ("manifest", "run", 4, "manifest is damaged"),
        ("manifest", "run/smooth", 4, "manifest is damaged"),
        ("recipe", "run", 4, "recipe cannot be read"),
        ("config", "run/export/model", 2, "config.json cannot be read"),
        ("scheme", "run/export/model", 4, "quantization_config"),
    ],
)
def test_errors_are_one_line_with_their_code(run_dir, capsys, damage, path, code, said):
    root = run_dir.parent
    shard, model = "smooth/layers/002.safetensors", run_dir / "export" / "model"
    if damage == "empty":
        path = "empty"
        (root / path).mkdir()
    elif damage == "cut":
        for file in (run_dir / shard, model / "model.safetensors"):
            file.write_bytes(file.read_bytes()[:-100])
    elif damage == "header":
        (run_dir / shard).write_bytes(b"\xff" * 40)
    elif damage == "manifest":
        (run_dir / "smooth" / "manifest.json").write_text('{"schema": 1}')
    elif damage == "recipe":
        (run_dir / "recipe.json").write_text('{"name": "x"}')
    elif damage == "config":
        (model / "config.json").write_text("[1]")
    elif damage == "scheme":
        config = json.loads((model / "config.json").read_text())
        config["quantization_config"]["surprise"] = 1
        (model / "config.json").write_text(json.dumps(config))
    where = path if path == "tiny-omni-w4a9" else str(root / path)
    assert app.main(["inspect", where, "--json"]) == code
    captured = capsys.readouterr()
    error = json.loads(captured.out)["error"]
    assert said in error["message"] and error["exit_code"] == code and error["where"]
    assert "Traceback" not in captured.err
