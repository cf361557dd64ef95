"""Whole quantized models: how modality ids reach the layers. Loading is in test_loading.py."""

import copy
import re
import threading

import pytest
import tiny_models
import torch
from masquant_kernels import dispatch
from tiny_quantized import quantized, scheme_of, site_tensors, solved_site

from masquant_cli.errors import ArtifactError, RecipeError
from masquant_cli.models.modality import modality_ids as ids_of_tokens
from masquant_cli.models.sites import find_sites
from masquant_cli.runtime import modality_ids
from masquant_cli.runtime.install import install
from masquant_cli.runtime.mas_linear import MasSite


def relative(got, want) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.fixture(scope="module")
def omni():
    model = tiny_models.omni_thinker()
    return quantized(model, scheme_of(model))


def all_sites(model):
    return [m for m in model.modules() if isinstance(m, MasSite)]


@torch.no_grad()
def test_the_model_routes_every_token_by_its_id(omni):
    """Against plain linears that are told the ids from outside."""
    model = tiny_models.omni_thinker()
    config, inputs = scheme_of(model), tiny_models.omni_inputs()
    ids = ids_of_tokens(inputs["input_ids"], config.token_ids, config.modalities)
    for layer in find_sites(model):
        for site in layer.sites:
            scale, low_rank = solved_site(site, config, seed=layer.layer)
            start = 0
            for name, out in zip(site.linears, site.out_features, strict=True):
                _rewrite(model.get_submodule(name), scale, low_rank, ids, start, config)
                start += out
    want = model(**inputs).logits
    with dispatch.force("reference"):
        assert relative(omni(**inputs).logits, want.double()) < 1e-4
    # ... and it matters: with all tokens taken for text the result is another one.
    with modality_ids(omni, torch.zeros_like(ids)):
        assert relative(omni(**inputs).logits, want.double()) > 1e-2


def _rewrite(linear, scale, low_rank, ids, start, config):
    w = linear.weight * scale[0]
    step = w.abs().amax(1, keepdim=True) / 7
    w = (w / step).round() * step
    factors = [low_rank[m] for m in config.modalities[1:]]

    def forward(x):
        u = x * (1 / scale)[ids]
        step = (u.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-30)  # padding is zero
        y = ((u / step).round() * step) @ w.T
        for m, (a, b) in enumerate(factors, 1):
            mask = (ids == m)[..., None]
            y = y + mask * (u @ a.float() @ b[:, start : start + linear.out_features].float())
        return y if linear.bias is None else y + linear.bias

    linear.forward = forward


@torch.no_grad()
def test_padding_and_batching_do_not_change_a_row(omni):
    inputs = tiny_models.omni_inputs(batch=1, pad=0)
    together = tiny_models.omni_inputs(batch=2, pad=3)  # row 1 is padded on the left
    together["input_ids"][1, 3:] = inputs["input_ids"][0]
    for key, rows in (("pixel_values", 16), ("input_features", 1)):
        together[key][rows:] = inputs[key]
    alone = omni.generate(**inputs, max_new_tokens=8, do_sample=False)
    both = omni.generate(**together, max_new_tokens=8, do_sample=False)
    assert both[1, 3:].tolist() == alone[0].tolist()
    logits = omni(**together).logits[1, 3:]
    assert relative(logits, omni(**inputs).logits[0].double()) < 1e-2


@torch.no_grad()
def test_cached_decoding_equals_recomputing_the_whole_sequence(omni):
    inputs = tiny_models.omni_inputs(batch=1, pad=0)
    cached = omni.generate(**inputs, max_new_tokens=6, do_sample=False, min_new_tokens=6)
    whole = omni.generate(
        **inputs, max_new_tokens=6, do_sample=False, min_new_tokens=6, use_cache=False
    )
    assert cached.tolist() == whole.tolist()
    # A placeholder as the one new token is of its own modality, also in a step of length one.
    past = omni(**inputs).past_key_values
    seen = _ids_seen(omni, input_ids=torch.tensor([[tiny_models.AUDIO]]), past_key_values=past)
    assert seen.tolist() == [[2]]


def _ids_seen(model, *args, **kwargs):
    """The ids that the first site sees in a forward pass."""
    seen = []
    site = all_sites(model)[0]
    hook = site.register_forward_pre_hook(
        lambda module, inputs: seen.append(module.context.current(inputs[0].shape).ids)
    )
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        hook.remove()
    return seen[0]


def test_ids_from_every_way_of_calling(omni, caplog):
    inputs = tiny_models.omni_inputs()
    expected = [0] * 9 + [1] * 4 + [0] * 5 + [2] * 10 + [0] * 5
    assert _ids_seen(omni, **inputs)[0].tolist() == expected
    positional = {k: v for k, v in inputs.items() if k != "input_ids"}
    assert _ids_seen(omni, inputs["input_ids"], **positional)[0].tolist() == expected
    # The inner model, without the outer one around it.
    inner = getattr(omni.model, "language_model", omni.model)
    words = tiny_models.text_inputs()["input_ids"]
    with torch.no_grad():
        embeds = omni.get_input_embeddings()(words)
    words[0, :3] = tiny_models.IMAGE
    context = all_sites(omni)[0].context
    seen = []
    hook = all_sites(omni)[0].register_forward_pre_hook(
        lambda module, x: seen.append(context.current(x[0].shape).ids.tolist())
    )
    with torch.no_grad():
        inner(input_ids=words)
        assert seen[-1] == [[1, 1, 1, 0, 0, 0, 0, 0, 0], [0] * 9]
        types = torch.tensor([[0, 1, 2, 3, 0, 0, 0, 0, 0]] * 2)
        context.enter(inner, (), {"inputs_embeds": embeds, "mm_token_type_ids": types})
        assert context.state.batch.ids[0].tolist() == [0, 1, 1, 2, 0, 0, 0, 0, 0]
        context.leave(inner)
        assert not caplog.records
        inner(inputs_embeds=embeds)
        inner(inputs_embeds=embeds)
        assert seen[-1] == [[0] * 9] * 2
        assert [r.message for r in caplog.records if "inputs_embeds alone" in r.message][1:] == []
        assert "inputs_embeds alone" in caplog.text
        forced = types.clamp(max=2)
        with modality_ids(omni, forced):
            inner(inputs_embeds=embeds)
            assert seen[-1] == forced.tolist()
            with pytest.raises(ValueError, match=r"\(2, 9\), the batch \(2, 8\)"):
                inner(inputs_embeds=embeds[:, :8])
        with pytest.raises(ValueError, match=r"0\.\.2"), modality_ids(omni, forced + 2):
            pass
    hook.remove()


@torch.no_grad()
def test_a_site_is_computed_once_for_all_its_linears(omni, monkeypatch):
    counts: dict[int, int] = {}
    compute = MasSite.compute

    def counting(self, *args):
        counts[id(self)] = counts.get(id(self), 0) + 1
        return compute(self, *args)

    monkeypatch.setattr(MasSite, "compute", counting)
    omni(**tiny_models.omni_inputs())
    assert counts == {id(site): 1 for site in all_sites(omni)}
    assert all_sites(omni)[0].context.state.cache is None  # nothing is kept afterwards


def test_a_failed_pass_leaves_nothing_behind(omni):
    inputs, words = tiny_models.omni_inputs(), tiny_models.text_inputs()
    with torch.no_grad():
        want, plain = omni(**inputs).logits, omni(**words).logits
        linear = omni.get_submodule(find_sites(omni)[1]["attn_in"].linears[1])

        def fail(*_):
            raise KeyboardInterrupt  # not an Exception: even torch's always_call hooks miss it

        handle = linear.register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            omni(**inputs)
        handle.remove()
        # Whatever is called next: an inner model that gets ids, or the whole one.
        inner = getattr(omni.model, "language_model", omni.model)
        assert torch.equal(omni.lm_head(inner(**words)[0]), plain)
        assert torch.equal(omni(**words).logits, plain)
        assert torch.equal(omni(**inputs).logits, want)


@torch.no_grad()
def test_copies_and_threads_do_not_share_ids(omni):
    batches = [tiny_models.omni_inputs(seed=s) for s in range(3)]
    batches.append(tiny_models.text_inputs(length=33))
    want = [omni(**batch).logits for batch in batches]
    copied = copy.deepcopy(omni)
    assert all_sites(copied)[0].context is not all_sites(omni)[0].context
    assert len({id(s.context) for s in all_sites(copied)}) == 1
    with modality_ids(omni, torch.zeros(2, 33, dtype=torch.long)):
        assert torch.equal(copied(**batches[0]).logits, want[0])
    wrong = []

    def work(index: int) -> None:
        with torch.no_grad():
            for _ in range(4):
                if not torch.allclose(omni(**batches[index]).logits, want[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_install_checks_its_tensors_and_leaves_the_model_alone_otherwise():
    model = tiny_models.qwen2_vl()
    config = scheme_of(model)
    tensors = site_tensors(model, config)
    before = {name: type(module) for name, module in model.named_modules()}
    key = next(k for k in tensors if k.endswith("q_proj.weight_scale"))
    for broken, message in [
        ({k: v for k, v in tensors.items() if k != key}, f"{re.escape(key)} is missing"),
        ({**tensors, key: tensors[key].half()}, f"{re.escape(key)} should be"),
        ({**tensors, "x.smooth_inv": torch.ones(1)}, "x.smooth_inv is in the checkpoint, but not"),
    ]:
        with pytest.raises(ArtifactError, match=message):
            install(model, config, broken)
        assert {name: type(module) for name, module in model.named_modules()} == before
    with pytest.raises(ValueError, match="needs the tensors"):
        install(model, config)
    install(model, config, tensors)
    with pytest.raises(RecipeError, match="quantized already"):
        install(model, config, tensors)
    assert len(find_sites(model)) == 2  # quantized linears are found like float ones


@torch.no_grad()
def test_one_modality_needs_no_ids():
    model = tiny_models.qwen2()
    text = quantized(model, scheme_of(model, weight_bits=8))
    words = tiny_models.text_inputs()
    assert relative(text(**words).logits, model(**words).logits.double()) < 0.1
    embeds = text.get_input_embeddings()(words["input_ids"])
    assert torch.equal(text(inputs_embeds=embeds).logits, text(input_ids=words["input_ids"]).logits)


@torch.no_grad()
def test_some_kinds_of_sites_may_stay_float():
    model = tiny_models.qwen2_vl()
    config = scheme_of(model, rank=0, sites=("attn_in", "mlp_out"))
    partly = quantized(model, config)
    layer = find_sites(partly)[0]
    kinds = {s.kind: type(partly.get_submodule(s.linears[0])).__name__ for s in layer.sites}
    assert kinds == {
        "attn_in": "MasLinear",
        "attn_out": "Linear",
        "mlp_in": "Linear",
        "mlp_out": "MasLinear",
    }
    partly(**tiny_models.vision_inputs())
