"""The ops, once: schema, shape rules, fake implementation. Which code runs is dispatch.py's choice.

    smooth_quant(x, smooth_inv, modality, bits, norm_weight, eps, up)
    add_smooth_quant(x, residual, smooth_inv, modality, bits, norm_weight, eps)
    lowrank_down(x, smooth_inv, modality, lr_a, norm_weight, eps, up)
    gemm_w4a8 | gemm_w8a8 | gemm_w4a16 | gemm_decode(...)

The functions here and torch.ops.masquant.* are the same; called from here, eager code does not
pay for torch's dispatcher, and traced code meets the ops.

T tokens, K inputs, Kp = K padded to a multiple of 128, N outputs, G groups, M modalities (the
first is the base), R the rank. Tensors:

    x, up, residual    f32 | bf16 | f16 [T, K], last dimension contiguous
    smooth_inv         f32 [M, K]            1 / s
    modality           int32 [T] in 0..M-1 (else ValueError on CPU, a NaN row on a GPU);
                       None: every token is of the base modality
    norm_weight, eps   float [K]: RMSNorm in front (x * rsqrt(mean x^2 + eps) * norm_weight)
    up                 silu(x) * up in front; not together with norm_weight
    q, scale           int8 [T, Kp], columns past K zero; f32 [T], NaN where a token is not finite
    lr_a, lr_b         f16 [M-1, K, R], f16 [M-1, R, N]
    h                  f32 (x f32) or bf16 [T, (M-1) * R]; zero where a token has another modality
    weight_packed      int8 [N, Kp / 2] nibble-block (packing.py), or [N, K] at 8 bits
    weight_scale       f32 [N, G]; G = 1 with group_size 0, else K / group_size
    weight_zero_point  int8 [N, G] or None

`reference.py` is the definition of every op. Arguments that do not fit raise ValueError.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from masquant_kernels import dispatch
from masquant_kernels.packing import PACK_BLOCK, packed_columns
from masquant_kernels.reference import hidden_dtype

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_PROLOGUE = "Tensor? norm_weight=None, float eps=0.0"
_WEIGHT = "Tensor weight_packed, Tensor weight_scale"
_EPILOGUE = "Tensor? bias, Tensor? h, Tensor? lr_b, Tensor? modality, ScalarType dtype"

SCHEMAS = {
    "smooth_quant": (
        "(Tensor x, Tensor smooth_inv, Tensor? modality, int bits, "
        f"{_PROLOGUE}, Tensor? up=None) -> (Tensor q, Tensor scale)"
    ),
    "add_smooth_quant": (
        "(Tensor x, Tensor residual, Tensor smooth_inv, Tensor? modality, int bits, "
        f"{_PROLOGUE}) -> (Tensor q, Tensor scale, Tensor total)"
    ),
    "lowrank_down": (
        "(Tensor x, Tensor smooth_inv, Tensor modality, Tensor lr_a, "
        f"{_PROLOGUE}, Tensor? up=None) -> Tensor"
    ),
    "gemm_w4a8": (
        f"(Tensor q, Tensor scale, {_WEIGHT}, Tensor? weight_zero_point, int group_size, "
        f"{_EPILOGUE}) -> Tensor"
    ),
    "gemm_w8a8": f"(Tensor q, Tensor scale, {_WEIGHT}, int group_size, {_EPILOGUE}) -> Tensor",
    "gemm_w4a16": (
        f"(Tensor u, {_WEIGHT}, Tensor? weight_zero_point, int group_size, {_EPILOGUE}) -> Tensor"
    ),
    "gemm_decode": (
        f"(Tensor q, Tensor scale, {_WEIGHT}, Tensor? weight_zero_point, int group_size, "
        "Tensor? bias, int weight_bits, ScalarType dtype) -> Tensor"
    ),
}
DECODE_TOKENS = 16  # gemm_decode takes at most this many

_library = torch.library.Library("masquant", "DEF")


# --- shape rules: each returns the outputs that its op must have -----------------------------


def _smooth_quant(x, smooth_inv, modality, bits, norm_weight=None, eps=0.0, up=None):
    _check_input(x, smooth_inv, modality, norm_weight, up)
    _require(bits in (4, 6, 8), lambda: f"activation bits must be 4, 6 or 8, got {bits}")
    return _quantized(x)


def _add_smooth_quant(x, residual, smooth_inv, modality, bits, norm_weight=None, eps=0.0):
    _require(
        residual.shape == x.shape and residual.dtype == x.dtype,
        lambda: f"residual is {_say(residual)}, x {_say(x)}",
    )
    return *_smooth_quant(x, smooth_inv, modality, bits, norm_weight), x.new_empty(x.shape)


def _quantized(x):
    tokens, columns = x.shape
    padded = -(-columns // PACK_BLOCK) * PACK_BLOCK
    return x.new_empty(tokens, padded, dtype=torch.int8), x.new_empty(tokens, dtype=torch.float32)


def _lowrank_down(x, smooth_inv, modality, lr_a, norm_weight=None, eps=0.0, up=None):
    _check_input(x, smooth_inv, modality, norm_weight, up)
    _require(modality is not None, lambda: "lowrank_down needs the modality of each token")
    count, columns = smooth_inv.shape[0] - 1, x.shape[1]
    _require(
        lr_a.dtype == torch.float16 and lr_a.ndim == 3 and lr_a.shape[:2] == (count, columns),
        lambda: f"lr_a must be float16 [{count}, {columns}, R], got {_say(lr_a)}",
    )
    return x.new_empty(x.shape[0], count * lr_a.shape[2], dtype=hidden_dtype(x.dtype))


def _gemm_w4a8(
    q, scale, weight_packed, weight_scale, weight_zero_point, group_size,
    bias, h, lr_b, modality, dtype,
):  # fmt: skip
    _check_quantized(q, scale)
    _check_weight(weight_packed, weight_scale, weight_zero_point, group_size, 4, q.shape[1])
    return _output(q, weight_packed, bias, h, lr_b, modality, dtype)


def _gemm_w8a8(
    q, scale, weight_packed, weight_scale, group_size, bias, h, lr_b, modality, dtype
):  # fmt: skip
    _check_quantized(q, scale)
    _check_weight(weight_packed, weight_scale, None, group_size, 8, q.shape[1])
    return _output(q, weight_packed, bias, h, lr_b, modality, dtype)


def _gemm_w4a16(
    u, weight_packed, weight_scale, weight_zero_point, group_size, bias, h, lr_b, modality, dtype
):  # fmt: skip
    _require(u.ndim == 2 and u.dtype in _FLOATS, lambda: f"u must be float [T, K], got {_say(u)}")
    _require(
        u.stride(1) == 1 or u.shape[1] <= 1, lambda: "u must be contiguous in its last dimension"
    )
    _check_weight(weight_packed, weight_scale, weight_zero_point, group_size, 4, u.shape[1])
    return _output(u, weight_packed, bias, h, lr_b, modality, dtype)


def _gemm_decode(
    q, scale, weight_packed, weight_scale, weight_zero_point, group_size, bias, weight_bits, dtype
):  # fmt: skip
    _require(
        q.shape[0] <= DECODE_TOKENS, lambda: f"gemm_decode takes at most {DECODE_TOKENS} tokens"
    )
    _require(weight_bits in (4, 8), lambda: f"weight_bits must be 4 or 8, got {weight_bits}")
    _check_quantized(q, scale)
    zero = weight_zero_point
    _check_weight(weight_packed, weight_scale, zero, group_size, weight_bits, q.shape[1])
    return _output(q, weight_packed, bias, None, None, None, dtype)


def _check_input(x, smooth_inv, modality, norm_weight, up):
    _require(x.ndim == 2 and x.dtype in _FLOATS, lambda: f"x must be float [T, K], got {_say(x)}")
    _require(
        x.stride(1) == 1 or x.shape[1] <= 1, lambda: "x must be contiguous in its last dimension"
    )
    tokens, columns = x.shape
    _require(
        smooth_inv.dtype == torch.float32
        and smooth_inv.ndim == 2
        and smooth_inv.shape[1] == columns
        and smooth_inv.is_contiguous(),
        lambda: f"smooth_inv must be contiguous float32 [M, {columns}], got {_say(smooth_inv)}",
    )
    _check_modality(modality, tokens)
    _check_range(modality, len(smooth_inv))
    if norm_weight is not None:
        _require(up is None, lambda: "norm_weight and up cannot be given together")
        _require(
            norm_weight.shape == (columns,) and norm_weight.dtype in _FLOATS,
            lambda: f"norm_weight must be float [{columns}], got {_say(norm_weight)}",
        )
    if up is not None:
        _require(
            up.shape == x.shape and up.dtype == x.dtype and (up.stride(1) == 1 or columns <= 1),
            lambda: f"up must be like x ({_say(x)}), got {_say(up)}",
        )


def _check_modality(modality, tokens):
    if modality is not None:
        _require(
            modality.dtype == torch.int32
            and modality.shape == (tokens,)
            and modality.is_contiguous(),
            lambda: f"modality must be contiguous int32 [{tokens}], got {_say(modality)}",
        )


def _check_range(modality, count):
    """On CPU alone: elsewhere looking at a value would wait for the device."""
    if modality is None or modality.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if isinstance(modality, FakeTensor) or not modality.numel():
        return
    low, high = (int(v) for v in modality.aminmax())
    _require(
        low >= 0 and high < count, lambda: f"modality lies in 0..{count - 1}, got {low}..{high}"
    )


def _check_quantized(q, scale):
    _require(
        q.ndim == 2
        and q.dtype == torch.int8
        and q.shape[1] % PACK_BLOCK == 0
        and q.is_contiguous(),
        lambda: f"q must be contiguous int8 [T, multiple of {PACK_BLOCK}], got {_say(q)}",
    )
    _require(
        scale.dtype == torch.float32 and scale.shape == (q.shape[0],),
        lambda: f"scale must be float32 [{q.shape[0]}], got {_say(scale)}",
    )


def _check_weight(packed, scale, zero, group_size, bits, columns):
    """columns: of the activations, Kp or (gemm_w4a16) K."""
    _require(
        packed.dtype == torch.int8 and packed.ndim == 2 and packed.is_contiguous(),
        lambda: f"weight_packed must be contiguous int8 [N, columns], got {_say(packed)}",
    )
    width = packed.shape[1]
    if bits == 4:
        fits = width == packed_columns(columns)
    else:
        fits = columns - PACK_BLOCK < width <= columns
    _require(fits, lambda: f"{columns} inputs do not meet {bits}-bit weight_packed {_say(packed)}")
    out = packed.shape[0]
    groups = scale.shape[1] if scale.ndim == 2 else 0
    fits = scale.dtype == torch.float32 and scale.shape == (out, groups) and scale.is_contiguous()
    if group_size:
        inputs = groups * group_size  # K, up to PACK_BLOCK - 1 less than the padded width
        fits = fits and columns - PACK_BLOCK < inputs <= columns
    else:
        fits = fits and groups == 1
    _require(
        fits and group_size >= 0,
        lambda: f"weight_scale {_say(scale)} does not fit N = {out}, group_size {group_size}",
    )
    if zero is not None:
        _require(
            zero.dtype == torch.int8 and zero.shape == scale.shape and zero.is_contiguous(),
            lambda: f"weight_zero_point must be int8 {tuple(scale.shape)}, got {_say(zero)}",
        )


def _output(x, weight_packed, bias, h, lr_b, modality, dtype):
    tokens, out = x.shape[0], weight_packed.shape[0]
    _require(dtype in _FLOATS, lambda: f"the output is float32, bfloat16 or float16, not {dtype}")
    if bias is not None:
        _require(
            bias.shape == (out,) and bias.dtype in _FLOATS and bias.is_contiguous(),
            lambda: f"bias must be float [{out}], got {_say(bias)}",
        )
    if h is not None:
        _require(lr_b is not None and modality is not None, lambda: "h needs lr_b and modality")
        _check_modality(modality, tokens)
        _require(
            lr_b.dtype == torch.float16
            and lr_b.ndim == 3
            and lr_b.shape[2] == out
            and lr_b.is_contiguous(),
            lambda: f"lr_b must be contiguous float16 [M-1, R, {out}], got {_say(lr_b)}",
        )
        width = lr_b.shape[0] * lr_b.shape[1]
        _require(
            h.dtype in (torch.float32, torch.bfloat16)
            and h.shape == (tokens, width)
            and h.is_contiguous(),
            lambda: f"h must be contiguous float32 or bfloat16 [{tokens}, {width}], got {_say(h)}",
        )
    return x.new_empty(tokens, out, dtype=dtype)


def _require(condition: bool, message: Callable[[], str]) -> None:
    if not condition:  # the message is made only now: these rules run at every call
        raise ValueError(f"masquant: {message()}")


def _say(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"


def _register(name: str):
    rule = globals()[f"_{name}"]
    _library.define(f"{name}{SCHEMAS[name]}")

    def run(*args, **kwargs):
        return dispatch.call(name, rule, args, kwargs)

    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"masquant::{name}", rule, lib=_library)
    op = getattr(torch.ops.masquant, name).default

    def entry(*args, **kwargs):
        # torch's dispatcher takes 10 us for this many arguments: as long as a small GEMV.
        plain = type(args[0]) is Tensor and not torch.compiler.is_compiling()
        return run(*args, **kwargs) if plain else op(*args, **kwargs)

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = f"torch.ops.masquant.{name}{SCHEMAS[name]}"
    return entry


smooth_quant = _register("smooth_quant")
add_smooth_quant = _register("add_smooth_quant")
lowrank_down = _register("lowrank_down")
gemm_w4a8 = _register("gemm_w4a8")
gemm_w8a8 = _register("gemm_w8a8")
gemm_w4a16 = _register("gemm_w4a16")
gemm_decode = _register("gemm_decode")
