"""One site and its linears, held to a literal equation 29 and to docs/format.md."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from literal_equation import literal
from masquant_kernels import dispatch
from tiny_quantized import solved_site
from torch import nn

from masquant_cli.errors import RecipeError
from masquant_cli.models.sites import Site
from masquant_cli.runtime.context import ModalityContext
from masquant_cli.runtime.mas_linear import MasLinear, MasSite
from masquant_cli.runtime.pack import export_tensors
from masquant_cli.runtime.scheme import Scheme

TOKENS = {"vision": (90,), "audio": (92,)}
MODALITIES = ("text", "vision", "audio")
IDS = torch.tensor([[0, 1, 1, 2, 0, 2], [0, 0, 0, 1, 0, 0]])


def scheme(rank: int = 3, **fields) -> Scheme:
    ranks = {"attn_in": rank} if rank else {}
    return Scheme(
        modalities=MODALITIES, token_ids=TOKENS, ranks=ranks, sites=("attn_in",), **fields
    )


class Block(nn.Module):
    """One site with two linears, quantized; `context` is what a model would hold."""

    def __init__(self, config: Scheme, columns: int = 96, outs=(48, 17), seed: int = 0):
        super().__init__()
        names = tuple(f"block.{'qkv'[i]}" for i in range(len(outs)))
        self.site = Site("attn_in", 0, "block", names, columns, outs)
        generator = torch.Generator().manual_seed(seed)
        self.weights = [torch.randn(out, columns, generator=generator) for out in outs]
        self.biases = [torch.randn(out, generator=generator) for out in outs]
        self.scale, self.low_rank = solved_site(self.site, config, seed)
        self.tensors = export_tensors(self.site, self.weights, self.scale, self.low_rank, config)
        self.config = config
        self.context = ModalityContext(config.modalities, config.token_ids)
        rank = config.rank("attn_in")
        self.shared = MasSite(columns, rank, config)
        self.linears = nn.ModuleList(
            MasLinear(columns, out, rank, config, torch.float32) for out in outs
        )
        self.shared.context = self.context
        self._fill(self.shared, "block.attn_in")
        for name, linear, bias in zip(names, self.linears, self.biases, strict=True):
            self._fill(linear, name)
            linear.bias.copy_(bias)
        self.shared.bind(self.linears)

    def _fill(self, module, name):
        prefix = f"{name}."
        own = {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}
        assert set(own) == set(module.state_dict()) - {"bias"}
        module.load_state_dict(own, strict=False)

    def run(self, x, ids=IDS, together=True):
        """Outputs of the linears: computed by their site at once, or each for itself."""
        self.context.state.forced, self.context.state.cache = ids, {} if together else None
        try:
            return [linear(x) for linear in self.linears]
        finally:
            self.context.state.forced = self.context.state.cache = None


def relative(got, want) -> float:
    return float((got.double() - want).norm() / want.norm())


def activations(columns: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*IDS.shape, columns, generator=generator) * 10 ** torch.rand(
        columns, generator=generator
    )


SCHEMES = {
    "w4a8": {},
    "w4a6": {"activation_bits": 6},
    "w4a4": {"activation_bits": 4},
    "w8a8": {"weight_bits": 8},
    "w4a8 groups": {"group_size": 8},
    "w8a8 groups": {"weight_bits": 8, "group_size": 8},
    "w4a16 asymmetric groups": {"activation_bits": 16, "symmetric": False, "group_size": 8},
    "w4a8 asymmetric": {"symmetric": False},
    "w4a8 no compensation": {"rank": 0},
}


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("columns", [96, 200])
def test_equation_29_literally(name, columns):
    block, x = Block(scheme(**SCHEMES[name]), columns), activations(columns)
    want = literal(block, x, IDS)
    for together in (True, False):
        for got, expected in zip(block.run(x, together=together), want, strict=True):
            assert got.dtype == x.dtype
            assert relative(got, expected) < 1e-5


def test_swapped_modalities_are_caught():
    """The comparison above would be worthless if it passed with the wrong scales or factors."""
    x = activations(96)
    want = literal(Block(scheme()), x, IDS)
    for key in ("smooth_inv", "lr_a"):
        block = Block(scheme())
        tensor = getattr(block.shared, key)
        tensor[-2:] = tensor[-2:].flip(0).clone()
        assert min(map(relative, block.run(x), want)) > 1e-3
    block = Block(scheme())
    for linear in block.linears:
        linear.lr_b.copy_(linear.lr_b.flip(0).clone())
    assert min(map(relative, block.run(x), want)) > 1e-3


def test_the_documented_example_with_numpy_alone():
    """docs/format.md is enough to reproduce an output, and the modules agree with it."""
    page = (Path(__file__).parent.parent / "docs" / "format.md").read_text()
    given = json.loads(re.search(r"```json\n(.*?)```", page, re.S).group(1))

    def dense(sparse: dict) -> np.ndarray:
        v = np.full(given["in"], sparse["rest"], np.float32)
        for index, value in sparse.items():
            if index != "rest":
                v[int(index)] = value
        return v

    q = np.zeros((given["out"], given["in"]), np.int64)
    for o, row in enumerate(given["weight_packed"]):
        data = bytes.fromhex(row)
        assert len(data) == -(-given["in"] // 128) * 64
        for i in range(given["in"]):
            byte = data[i // 128 * 64 + i % 64]
            nibble = byte >> 4 if i % 128 >= 64 else byte & 15
            q[o, i] = nibble - 16 if nibble >= 8 else nibble
    w = q * np.array(given["weight_scale"])
    x, bias = dense(given["x"]), np.array(given["bias"])
    for m, modality in enumerate(given["quantization_config"]["modalities"]):
        u = x * dense(given["smooth_inv"][m])
        t = np.abs(u).max() / 127
        y = w @ (np.round(u / t) * t) + bias
        if m:
            y += u @ dense(given["lr_a"][m - 1])[:, None] @ np.array(given["lr_b"][m - 1])
        np.testing.assert_allclose(y, given["y"][modality], rtol=1e-6)

    config = Scheme(
        modalities=("text", "vision"),
        token_ids={"vision": (9,)},
        ranks=given["quantization_config"]["ranks"],
        sites=("attn_out",),
    )
    shared = MasSite(given["in"], 1, config)
    shared.context = ModalityContext(config.modalities, config.token_ids)
    linear = MasLinear(given["in"], given["out"], 1, config, torch.float32)
    shared.bind([linear])
    packed = np.array([list(bytes.fromhex(r)) for r in given["weight_packed"]], np.uint8)
    shared.load_state_dict(
        {
            "smooth_inv": torch.tensor(np.array([dense(v) for v in given["smooth_inv"]])),
            "lr_a": torch.tensor(np.array([dense(v) for v in given["lr_a"]]))[..., None],
        }
    )
    linear.load_state_dict(
        {
            "weight_packed": torch.tensor(packed.view(np.int8)),
            "weight_scale": torch.tensor(given["weight_scale"]),
            "lr_b": torch.tensor(given["lr_b"]),
            "bias": torch.tensor(given["bias"]),
        }
    )
    shared.context.state.forced = torch.tensor([[0, 1]])
    y = linear(torch.tensor(x).expand(1, 2, -1))
    np.testing.assert_allclose(y[0].numpy(), list(given["y"].values()), rtol=1e-6)


def test_exact_keys_shapes_and_dtypes():
    block = Block(scheme(symmetric=False, group_size=8), 200)
    found = {key: (tuple(t.shape), t.dtype) for key, t in block.tensors.items()}
    f32, f16, i8 = torch.float32, torch.float16, torch.int8
    assert found == {
        "block.attn_in.smooth_inv": ((3, 200), f32),
        "block.attn_in.lr_a": ((2, 200, 3), f16),
        "block.q.weight_packed": ((48, 128), i8),
        "block.q.weight_scale": ((48, 25), f32),
        "block.q.weight_zero_point": ((48, 25), i8),
        "block.q.lr_b": ((2, 3, 48), f16),
        "block.k.weight_packed": ((17, 128), i8),
        "block.k.weight_scale": ((17, 25), f32),
        "block.k.weight_zero_point": ((17, 25), i8),
        "block.k.lr_b": ((2, 3, 17), f16),
    }
    assert all(tensor.is_contiguous() for tensor in block.tensors.values())
    plain = Block(scheme(rank=0, weight_bits=8), 200)
    assert set(plain.tensors) == {
        "block.attn_in.smooth_inv",
        *(f"block.{n}.{key}" for n in "qk" for key in ("weight_packed", "weight_scale")),
    }
    assert plain.tensors["block.q.weight_packed"].shape == (48, 200)


def test_a_rank_smaller_than_the_scheme_is_padded_and_a_missing_modality_is_zero():
    block = Block(scheme(rank=2))
    wider, x = scheme(rank=4), activations(96)
    low_rank = {"audio": block.low_rank["audio"]}
    tensors = export_tensors(block.site, block.weights, block.scale, low_rank, wider)
    assert tensors["block.attn_in.lr_a"].shape == (2, 96, 4)
    other = Block(wider)
    for module, name in ((other.shared, "attn_in"), (other.linears[0], "q")):
        for key in module.state_dict():
            if key != "bias":
                getattr(module, key).copy_(tensors[f"block.{name}.{key}"])
    block.low_rank["vision"] = tuple(torch.zeros_like(f) for f in block.low_rank["vision"])
    assert relative(other.run(x)[0], literal(block, x, IDS)[0]) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": torch.zeros(3, 96)}, "positive"),
        ({"scale": torch.ones(2, 96)}, r"scale of shape \(2, 96\)"),
        ({"low_rank": {"video": ()}}, "video"),
        ({"low_rank": {"audio": (torch.ones(96, 9), torch.ones(9, 65))}}, "audio factors"),
        ({"low_rank": {"audio": (torch.full((96, 3), 1e6), torch.ones(3, 65))}}, "fit fp16"),
        ({"weights": [torch.full((48, 96), torch.nan), torch.ones(17, 96)]}, "not finite"),
        ({"weights": [torch.ones(48, 96)]}, "1 weights"),
        ({"scheme": scheme(group_size=64)}, "group size 64 does not divide 96"),
    ],
)
def test_export_refuses_what_it_cannot_store(change, message):
    block = Block(scheme())
    arguments = {
        "weights": block.weights,
        "scale": block.scale,
        "low_rank": block.low_rank,
        "scheme": block.config,
    }
    with pytest.raises(RecipeError, match=message) as caught:
        export_tensors(block.site, **{**arguments, **change})
    assert caught.value.where


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_activations_are_computed_in_fp32(dtype):
    block, x = Block(scheme()), activations(96).to(dtype)
    for got, want in zip(block.run(x), literal(block, x, IDS), strict=True):
        assert got.dtype == dtype
        assert relative(got, want) < 2 * torch.finfo(dtype).eps
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(block.run(x.float())[0], literal(block, x, IDS)[0]) < 1e-5


def test_factors_of_absent_modalities_are_never_touched():
    block, x = Block(scheme()), activations(96)
    block.shared.lr_a.fill_(torch.nan)
    for linear in block.linears:
        linear.lr_b.fill_(torch.nan)
    text = torch.zeros_like(IDS)
    assert relative(block.run(x, text)[0], literal(block, x, text)[0]) < 1e-5
    with dispatch.force("reference"):  # kernels may make anything of a factor that is not finite
        assert torch.isnan(block.run(x)[0]).any()
    block = Block(scheme())
    block.shared.lr_a[1].fill_(torch.nan)  # audio
    vision = (IDS == 1).long()
    assert relative(block.run(x, vision)[0], literal(block, x, vision)[0]) < 1e-5


def test_activations_that_are_not_finite_show_in_their_own_token_alone():
    block, x = Block(scheme()), activations(96)
    x[0, 1, 5], x[1, 0, 7] = torch.nan, torch.inf
    finite = torch.isfinite(block.run(x)[0]).all(-1)
    expected = torch.ones(2, 6, dtype=torch.bool)
    expected[0, 1] = expected[1, 0] = False
    assert torch.equal(finite, expected)


def test_tokens_and_widths_that_do_not_fit_are_errors():
    block, x = Block(scheme()), activations(96)
    with pytest.raises(ValueError, match="expected 96 inputs"):
        block.run(x[..., :95])
    with pytest.raises(ValueError, match="do not describe the same tokens"):
        block.run(x, IDS[:, :5])
    with pytest.raises(ValueError, match=r"0\.\.2 .*got 0\.\.3"):
        block.run(x, IDS + (IDS == 2))
    with pytest.raises(ValueError, match=r"got -1\.\."):
        block.run(x, IDS - 1)
    with pytest.raises(ValueError, match="integers"):
        block.run(x, IDS.float())
    with pytest.raises(ValueError, match="outside the model's forward pass"):
        block.linears[0](x)
    assert block.run(x.reshape(-1, 96))[0].shape == (12, 48)  # flattened tokens do fit


def test_scales_keep_their_precision_under_a_cast():
    block, x = Block(scheme()), activations(96)
    before = block.run(x)
    block.to(torch.bfloat16)
    assert block.shared.smooth_inv.dtype == torch.float32
    assert block.linears[0].weight_scale.dtype == torch.float32
    assert block.linears[0].lr_b.dtype == torch.float16
    assert all(torch.equal(a, b) for a, b in zip(before, block.run(x), strict=True))


def test_the_shared_input_is_reused_only_while_it_is_still_right():
    block, x = Block(scheme()), activations(96).requires_grad_()
    block.context.state.cache, block.context.state.forced = {}, IDS
    with torch.no_grad():
        block.linears[0](x)
    block.linears[1](x).sum().backward()  # what had no graph must not serve here
    assert x.grad is not None
    x = x.detach()
    block.linears[0](x)
    x.mul_(-2)
    assert relative(block.linears[1](x), literal(block, x, IDS)[1]) < 1e-5


@torch.no_grad()
def test_a_site_compiles_in_one_graph():
    block, x = Block(scheme()), activations(96)
    run = torch.compile(
        lambda x: [linear(x) for linear in block.linears], fullgraph=True, backend="aot_eager"
    )
    for ids in (IDS, IDS.flip(1), torch.zeros_like(IDS)):
        block.context.state.batch = block.context.batch(ids)
        for got, want in zip(run(x), literal(block, x, ids), strict=True):
            assert relative(got, want) < 1e-5
