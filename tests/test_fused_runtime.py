"""Whole models with fused sites, held to the same models run linear by linear in plain torch."""

import copy
import pickle
import threading
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from masquant_kernels import dispatch
from plain_runtime import plainly
from safetensors.torch import load_file
from tiny_quantized import quantized, scheme_of
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.phi3.modeling_phi3 import Phi3MLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm

import masquant_cli
from masquant_cli.models.families import MLP
from masquant_cli.models.modality import token_ids_of
from masquant_cli.models.sites import find_sites
from masquant_cli.runtime import equation, mas_linear, modality_ids
from masquant_cli.runtime.blocks import GatedMLP, MasRMSNorm, is_gated_mlp, is_rms_norm
from masquant_cli.runtime.mas_linear import MasLinear, MasSite

TEXT = {k: v for k, v in tiny_models._TEXT.items() if k != "rope_parameters"}
MODELS = {
    "omni": (tiny_models.omni_thinker, tiny_models.omni_inputs),
    "qwen2_5_vl": (tiny_models.qwen2_5_vl, tiny_models.vision_inputs),
    "qwen2_vl": (tiny_models.qwen2_vl, tiny_models.vision_inputs),
    "qwen2": (tiny_models.qwen2, tiny_models.text_inputs),
    "qwen3": (
        lambda: tiny_models._seeded(Qwen3ForCausalLM, Qwen3Config(**TEXT, head_dim=24), 0),
        tiny_models.text_inputs,
    ),
    "llama": (
        lambda: tiny_models._seeded(LlamaForCausalLM, LlamaConfig(**TEXT), 0),
        tiny_models.text_inputs,
    ),
    "mistral": (
        lambda: tiny_models._seeded(MistralForCausalLM, MistralConfig(**TEXT), 0),
        tiny_models.text_inputs,
    ),
}


def relative(got, want) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def assert_same(got, want, rounds: bool = True):
    """The same function: [..., tokens, width] up to the order of fp32 sums of at most 200 terms.

    Where activations are rounded, that moves one in 1e5 of them to the next integer, which shows
    in its own token (and those that attend to it) alone. A wrong result shows in all of a kind.
    """
    error = (got.double() - want.double()).norm(dim=-1) / want.double().norm(dim=-1)
    if not rounds:
        assert float(error.max()) < 2e-5
    assert float(error.median()) < 2e-5
    assert float((error > 1e-4).double().mean()) < 0.15 and float(error.max()) < 0.1


@pytest.fixture(autouse=True)
def definition():
    """Every op by its definition; kernels have their own tests, and one below."""
    with dispatch.force("reference"):
        yield


def of(model, kind):
    return [m for m in model.modules() if isinstance(m, kind)]


@pytest.fixture(scope="module")
def omni():
    model = tiny_models.omni_thinker()
    return quantized(model, scheme_of(model))


@pytest.fixture
def fronts(monkeypatch):
    """Every (Front, modality) that a site runs with, in order."""
    seen, real = [], mas_linear.outputs

    def spy(x, front, smooth_inv, lr_a, modality, *rest):
        seen.append((front, modality))
        return real(x, front, smooth_inv, lr_a, modality, *rest)

    monkeypatch.setattr(mas_linear, "outputs", spy)
    return seen


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_every_family_fuses_norm_and_silu_and_stays_the_same_function(name, fronts):
    make, inputs = MODELS[name]
    model, inputs = make(), inputs()
    model = quantized(model, scheme_of(model))
    got = model(**inputs, output_hidden_states=True)
    # Per layer: q,k,v behind a norm, o, gate and up behind a norm, down behind silu * up.
    per_layer = [(True, False), (False, False), (True, False), (False, True)]
    assert [(f.norm_weight is not None, f.up is not None) for f, _ in fronts] == per_layer * 2
    with plainly(model):
        want = model(**inputs, output_hidden_states=True)
    watched = fronts[8:]  # sites still run under the hooks, whose results replace theirs
    assert not any(f.norm_weight is not None or f.up is not None for f, _ in watched)
    assert_same(got.logits, want.logits)
    assert len(got.hidden_states) == 3
    for mine, theirs in zip(got.hidden_states, want.hidden_states, strict=True):
        assert_same(mine, theirs)


@torch.no_grad()
@pytest.mark.parametrize(
    "fields",
    [
        {"weight_bits": 8},
        {"weight_bits": 8, "group_size": 8},
        {"group_size": 8},
        {"symmetric": False},
        {"symmetric": False, "group_size": 8, "activation_bits": 16},
        {"weight_bits": 8, "activation_bits": 16},
        {"activation_bits": 4},
        {"activation_bits": 6, "rank": 0},
        {"sites": ("attn_in", "mlp_out")},
        {"sites": ("attn_out", "mlp_in"), "rank": 0},
    ],
    ids=str,
)
def test_every_scheme_is_the_same_function(fields):
    model, inputs = tiny_models.qwen2_vl(), tiny_models.vision_inputs()
    if "sites" in fields:
        fields = {"rank": 0, **fields}
    model = quantized(model, scheme_of(model, **fields))
    got = model(**inputs).logits
    with plainly(model):
        assert_same(got, model(**inputs).logits, rounds=fields.get("activation_bits") != 16)


@torch.no_grad()
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_activations(dtype, bits):
    """No further from fp32 than the unfused model in that dtype, which rounds between the ops."""
    model, inputs = tiny_models.qwen2_vl(), tiny_models.vision_inputs()
    model = quantized(model, scheme_of(model, activation_bits=bits))
    exact = model(**inputs).logits
    low = copy.deepcopy(model).to(dtype)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    got = low(**inputs).logits
    assert got.dtype == dtype
    with plainly(low):
        plain = relative(low(**inputs).logits, exact)
    assert relative(got, exact) < 1.5 * plain


@torch.no_grad()
@pytest.mark.parametrize("name", ["omni", "qwen2_vl", "qwen2"])
@pytest.mark.parametrize("bits", [8, 16])
def test_the_kernels_of_this_machine_give_the_same_model(name, bits):
    """They may round the low-rank part at 2e-4. At 16 bits nothing magnifies that; at 8 one
    activation in the next integer is 1/127 of its token's largest."""
    make, inputs = MODELS[name]
    model, inputs = make(), inputs()
    model = quantized(model, scheme_of(model, activation_bits=bits))
    want = model(**inputs).logits
    with dispatch.force(None):
        got = model(**inputs).logits
    error = (got - want).norm(dim=-1) / want.norm(dim=-1)
    assert float(error.max()) < (0.1 if bits == 8 else 1e-3)


def test_only_what_is_the_same_function_is_replaced():
    assert is_rms_norm(Qwen2RMSNorm(8))
    assert not is_rms_norm(torch.nn.LayerNorm(8))
    gemma = GemmaRMSNorm(8)
    assert not is_rms_norm(gemma)
    gemma.variance_epsilon = gemma.eps  # its names alone do not tell: it scales by 1 + weight

    assert not is_rms_norm(gemma)
    patched = Qwen2RMSNorm(8)
    patched.forward = lambda x: x
    assert not is_rms_norm(patched)

    config = Qwen2Config(**TEXT)
    assert is_gated_mlp(Qwen2MLP(config))
    assert not is_gated_mlp(Qwen2MLP(Qwen2Config(**TEXT, hidden_act="gelu")))
    assert not is_gated_mlp(Phi3MLP(config))

    class SwappedMLP(Qwen2MLP):
        def forward(self, x):
            return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))

    class Dropped(Qwen2MLP):
        def __init__(self, config):
            super().__init__(config)
            self.dropout = torch.nn.Dropout(0.5)

    assert not is_gated_mlp(SwappedMLP(config)) and not is_gated_mlp(Dropped(config))


def test_every_declared_norm_and_block_exists():
    for make, _ in MODELS.values():
        model = make()
        for layer in find_sites(model):
            module = model.get_submodule(layer.module)
            assert is_rms_norm(module.input_layernorm)
            assert is_rms_norm(module.post_attention_layernorm)
            assert is_gated_mlp(module.get_submodule(MLP))


@torch.no_grad()
def test_an_observer_sees_what_the_float_model_would_show():
    model, inputs = tiny_models.qwen2_vl(), tiny_models.vision_inputs()
    small = quantized(model, scheme_of(model))
    want = small(**inputs).logits
    assert len(of(small, MasRMSNorm)) == 4 and len(of(small, GatedMLP)) == 2
    layer, seen = find_sites(small)[0], {}
    for site in layer.sites:

        def look(_module, args, kind=site.kind):
            seen[kind] = args[0]

        small.get_submodule(site.linears[-1]).register_forward_pre_hook(look)
    block = small.get_submodule(layer.module)
    block.register_forward_pre_hook(lambda _m, args, kw: seen.update(x=args[0]), with_kwargs=True)
    assert_same(small(**inputs).logits, want)
    norm = model.get_submodule(layer.module).input_layernorm
    assert torch.allclose(seen["attn_in"], norm(seen["x"]), rtol=1e-6)
    with modality_ids(small, small_ids := (inputs["input_ids"] == tiny_models.IMAGE).long()):
        gate, up = (m(seen["mlp_in"]) for m in (block.mlp.gate_proj, block.mlp.up_proj))
    assert small_ids.any()
    assert_same(seen["mlp_out"], torch.nn.functional.silu(gate) * up)


def test_a_tensor_that_the_norm_did_not_return_is_refused(omni):
    inputs, layer = tiny_models.omni_inputs(), find_sites(omni)[0]
    block = omni.get_submodule(f"{layer.module}.self_attn")
    forward = type(block).forward

    def elsewhere(hidden_states, **kwargs):
        return forward(block, hidden_states=hidden_states.clone(), **kwargs)

    block.forward = elsewhere
    try:
        with torch.no_grad(), pytest.raises(RuntimeError, match="another tensor than its output"):
            omni(**inputs)
    finally:
        del block.forward


def storages(model, kinds=(MasLinear, MasSite)) -> int:
    """Bytes of the distinct storages that quantized modules hold."""
    held = {}
    for module in of(model, kinds):
        tensors = list(module.buffers(recurse=False))
        if isinstance(module, MasSite) and module.fused is not None:
            tensors += [t for t in module.fused[1] if t is not None]
        for tensor in tensors:
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
    return sum(held.values())


def own_bytes(model) -> int:
    return sum(t.nbytes for m in of(model, (MasLinear, MasSite)) for t in m.state_dict().values())


@torch.no_grad()
def test_weights_are_held_once_and_follow_every_change(omni, tmp_path):
    inputs = tiny_models.omni_inputs()
    model = copy.deepcopy(omni)
    want = model(**inputs).logits
    assert storages(model) == own_bytes(model)
    shared = of(model, MasSite)[0]
    q, k, _ = shared.linears
    address = q.weight_packed.untyped_storage().data_ptr()
    assert address == k.weight_packed.untyped_storage().data_ptr()

    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert all(value.is_contiguous() for value in model.state_dict().values())
    other = {key: v.flip(0) if key.endswith("lr_b") else v for key, v in state.items()}
    for assign in (False, True):
        model.load_state_dict(other, assign=assign)
        changed = model(**inputs).logits
        assert relative(changed, want) > 1e-3
        with plainly(model):
            assert_same(changed, model(**inputs).logits)
        model.load_state_dict(state, assign=assign)
        assert torch.equal(model(**inputs).logits, want)
        assert storages(model) == own_bytes(model)

    k.weight_scale.mul_(2)  # in place
    in_place = model(**inputs).logits
    assert relative(in_place, want) > 1e-3
    k.weight_scale = k.weight_scale / 2  # another tensor
    assert torch.equal(model(**inputs).logits, want)
    assert storages(model) == own_bytes(model)
    assert torch.equal(model.to(torch.float64).to(torch.float32)(**inputs).logits, want)
    assert storages(model) == own_bytes(model)


@torch.no_grad()
def test_copies_and_pickles_stand_alone(omni):
    inputs = tiny_models.omni_inputs()
    want = omni(**inputs).logits
    whole = pickle.dumps(omni)
    assert len(whole) < 1.2 * sum(t.nbytes for t in omni.state_dict().values()) + 300_000
    for made in (copy.deepcopy(omni), pickle.loads(whole)):
        assert storages(made) == own_bytes(made)  # before and after it is fused
        assert torch.equal(made(**inputs).logits, want)
        assert storages(made) == own_bytes(made)
        of(made, MasSite)[0].linears[1].weight_packed.zero_()
        assert not torch.equal(made(**inputs).logits, want)
    assert torch.equal(omni(**inputs).logits, want)


@torch.no_grad()
@pytest.mark.parametrize("size", ["5GB", "60KB"])
def test_a_model_that_has_run_saves_as_before(size, omni, tmp_path):
    inputs = tiny_models.omni_inputs()
    want = omni(**inputs).logits
    omni.config.quantization_config = scheme_of(tiny_models.omni_thinker()).to_dict()
    try:
        omni.save_pretrained(tmp_path, max_shard_size=size)
    finally:
        del omni.config.quantization_config
    found = {}
    for file in tmp_path.glob("*.safetensors"):
        found |= load_file(file)
    state = omni.state_dict()
    assert sum(t.nbytes for t in found.values()) == sum(t.nbytes for t in state.values())
    assert (len(list(tmp_path.glob("*.safetensors"))) == 1) == (size == "5GB")
    loaded = masquant_cli.load_quantized(tmp_path)
    assert all(site.fused is not None for site in of(loaded, MasSite))
    with torch.enable_grad():  # asked for or not: nothing here has a gradient, so kernels may run
        assert torch.equal(loaded(**inputs).logits, want)


@torch.no_grad()
def test_linears_that_cannot_be_joined_run_one_by_one():
    model, inputs = tiny_models.qwen2_vl(), tiny_models.vision_inputs()
    small = quantized(model, scheme_of(model))
    for site in of(small, MasSite):
        if len(site.linears) == 3:
            site.linears[1].bias = None
    got = small(**inputs).logits
    assert any(site.weights() is None for site in of(small, MasSite))
    with plainly(small):
        assert_same(got, small(**inputs).logits)


def offload(model):
    """As accelerate does it: a module has its tensors only while its own forward runs."""
    for module in model.modules():
        forward = module.forward
        held = [
            (place, name, tensor)
            for place in (module._parameters, module._buffers)
            for name, tensor in place.items()
            if tensor is not None
        ]

        def empty(held=held):
            for place, name, tensor in held:
                away = tensor.to("meta")
                wrapped = isinstance(tensor, torch.nn.Parameter)
                place[name] = torch.nn.Parameter(away) if wrapped else away

        def run(*args, forward=forward, held=held, empty=empty, **kwargs):
            for place, name, tensor in held:
                place[name] = tensor
            try:
                return forward(*args, **kwargs)
            finally:
                empty()

        empty()
        module.forward = run


@torch.no_grad()
def test_an_offloaded_model_runs_linear_by_linear():
    model, inputs = tiny_models.qwen2_vl(), tiny_models.vision_inputs()
    small = quantized(model, scheme_of(model))
    want = small(**inputs).logits
    offload(small)
    assert small.model.language_model.layers[0].self_attn.q_proj.weight_packed.is_meta
    assert_same(small(**inputs).logits, want)
    assert all(site.weights() is None for site in of(small, MasSite))


@torch.no_grad()
def test_the_first_pass_of_several_threads(omni):
    batches = [tiny_models.omni_inputs(seed=s) for s in range(4)]
    want = [omni(**batch).logits for batch in batches]
    for _ in range(3):
        fresh, found = copy.deepcopy(omni), {}
        barrier = threading.Barrier(len(batches))

        def work(index, fresh=fresh, found=found, barrier=barrier):
            barrier.wait()
            with torch.no_grad():
                found[index] = fresh(**batches[index]).logits

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(batches))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(found[i], want[i]) for i in range(len(batches)))
        assert storages(fresh) == own_bytes(fresh)


def test_inference_mode_leaves_ordinary_tensors(omni):
    inputs, model = tiny_models.omni_inputs(), copy.deepcopy(omni)
    with torch.inference_mode():
        want = model(**inputs).logits
    assert not any(t.is_inference() for t in model.state_dict().values())
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, want)


def test_gradients_reach_the_input_as_in_the_plain_model(omni, monkeypatch):
    kernels = SimpleNamespace(DECODE_TOKENS=16)  # none at all: they have no derivative
    monkeypatch.setattr(equation, "ops", kernels)
    words = tiny_models.text_inputs()["input_ids"]
    embeds = omni.get_input_embeddings()(words).detach()
    inner = getattr(omni.model, "language_model", omni.model)
    found = []
    for run in (False, True):
        x = embeds.clone().requires_grad_()
        with plainly(omni) if run else torch.enable_grad():
            inner(inputs_embeds=x)[0].square().sum().backward()
        found.append(x.grad)
    assert float(found[1].norm()) > 0 and relative(*found) < 1e-2


# --- generation


def generated(model, inputs, **options):
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **options}
    # A random model may write the token of a picture, and then there is no picture for it.
    media = sorted({i for ids in token_ids_of(model.config).values() for i in ids})
    if media:
        options["suppress_tokens"] = media
    return model.generate(**inputs, **options).tolist()


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"num_beams": 3, "use_cache": False}, {"prefill_chunk_size": 4}],
    ids=str,
)
@pytest.mark.parametrize("name", ["omni", "qwen2"])
def test_generation_is_that_of_the_plain_model(name, options):
    make, inputs = MODELS[name]
    model = make()
    inputs = inputs()  # omni: two rows, one padded on the left
    if "prefill_chunk_size" in options:
        inputs = tiny_models.text_inputs()
    try:
        generated(model, inputs, **options)
    except RuntimeError as error:  # Transformers 5.17, for one
        pytest.skip(f"this Transformers cannot do it with the float model either: {error}")
    model = quantized(model, scheme_of(model))
    got = generated(model, inputs, **options)
    with plainly(model):
        assert got == generated(model, inputs, **options)


@torch.no_grad()
def test_decoding_text_does_no_low_rank_work(omni, fronts):
    inputs = tiny_models.omni_inputs()
    generated(omni, inputs, max_new_tokens=4, min_new_tokens=4)
    sites = len(of(omni, MasSite))
    prompt, steps = fronts[:sites], fronts[sites:]
    assert all(modality.dtype == torch.int32 for _, modality in prompt)
    assert len({modality.data_ptr() for _, modality in prompt}) == 1  # made once for all layers
    assert len(steps) == 3 * sites and all(modality is None for _, modality in steps)


@torch.no_grad()
def test_a_prompt_in_chunks_is_the_prompt(omni):
    inputs = tiny_models.omni_inputs(batch=1, pad=0)
    whole = omni(**inputs).logits
    cut = 28  # behind the sound: what is left is text
    first = {**inputs, "input_ids": inputs["input_ids"][:, :cut]}
    first["attention_mask"] = inputs["attention_mask"][:, :cut]
    begun = omni(**first, use_cache=True)
    length = inputs["input_ids"].shape[1]
    holder = omni.model if hasattr(omni.model, "rope_deltas") else omni  # it moved between releases
    positions = torch.arange(cut, length) + holder.rope_deltas
    rest = omni(
        input_ids=inputs["input_ids"][:, cut:],
        position_ids=positions.expand(3, 1, -1),
        past_key_values=begun.past_key_values,
    )
    assert_same(torch.cat([begun.logits, rest.logits], 1), whole)


@torch.no_grad()
def test_a_compiled_model_is_told_the_ids_of_every_batch():
    model = quantized(tiny_models.qwen2_vl(), scheme_of(tiny_models.qwen2_vl()))
    inner = model.model.language_model
    run = torch.compile(inner, backend="eager")
    words = tiny_models.text_inputs()["input_ids"]
    mixed = words.index_fill(1, torch.arange(3), tiny_models.IMAGE)
    for batch in (mixed, words, mixed.flip(1)):
        assert_same(run(input_ids=batch)[0], inner(input_ids=batch)[0])


@torch.no_grad()
@pytest.mark.parametrize("part", ["self_attn", "self_attn.k_proj", "mlp"])
def test_a_compiled_part_behind_an_eager_norm(part):
    """The norm has left its work to a site that runs in compiled code."""
    model = quantized(tiny_models.qwen2_vl(), scheme_of(tiny_models.qwen2_vl()))
    inner = model.model.language_model
    words = tiny_models.text_inputs()["input_ids"]
    batches = words.index_fill(1, torch.arange(3), tiny_models.IMAGE), words
    want = [inner(input_ids=batch)[0] for batch in batches]
    for layer in inner.layers:
        layer.get_submodule(part).compile(backend="eager")
    for batch, expected in zip(batches, want, strict=True):
        assert_same(inner(input_ids=batch)[0], expected)
