"""What else could do the work: dense float, torch's own integer and fp8 products, other libraries.

Each is checked like ours. Those that quantize their input by themselves are held to the float
product within the error that their bits explain; all others to their exact definition.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from masquant_cli.bench import gate
from masquant_cli.bench.about import version
from masquant_cli.bench.measure import Candidate
from masquant_cli.bench.operands import Weights, copies
from masquant_cli.bench.timing import Run

DENSE = (torch.float32, torch.bfloat16, torch.float16)
LIBRARIES = ("gemlite", "torchao")


def say(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def availability() -> dict[str, str]:
    return {name: version(name) or "not installed" for name in LIBRARIES}


def rows_of(y: Tensor) -> Tensor:
    return gate.sample(y.shape[0], y.device)


def dense(weights: Weights, x: Tensor) -> Iterator[Candidate]:
    """x @ W.T in every float dtype; the fastest is what we compare with."""
    k, n, tokens = weights.linear.k, weights.linear.n, x.shape[0]
    for dtype in DENSE:
        given, kept = x.to(dtype), copies(weights.dense(dtype), x.device)

        def run(i: int, given=given, kept=kept):
            return torch.nn.functional.linear(given, kept[i % len(kept)])

        def check(given=given, kept=kept, run=run):
            y = run(0)
            rows = rows_of(y)
            want = given[rows].double() @ kept[0].double().T
            return gate.floats(y[rows], want, gate.tolerance(y.dtype, k))

        moved = dtype.itemsize * (tokens * k + n * k + tokens * n)
        yield Candidate(
            f"dense {say(dtype)}", run, check, 2 * tokens * k * n, moved, say(dtype), baseline=True
        )


def int_mm(weights: Weights, q: Tensor, scale: Tensor, dtype: torch.dtype) -> Iterator[Candidate]:
    """torch._int_mm of given int8 activations, then the two scales."""
    k, n, tokens = weights.linear.k, weights.linear.n, q.shape[0]
    if q.is_cuda and (tokens <= 16 or k % 8 or n % 8):
        return  # cuBLAS refuses
    q = q[:, :k].contiguous()
    columns = scale[:, None], weights.scale.T
    if q.is_cuda:
        kept = [weights.packed8.t()]  # column-major, as cuBLAS wants it
    else:
        kept = copies(weights.packed8.t().contiguous(), q.device)

    def run(i: int):
        sums = torch._int_mm(q, kept[i % len(kept)])
        return (sums * columns[0] * columns[1]).to(dtype)

    run = _fast_integers(run, q)
    yield _exact("torch._int_mm + scales", run, weights, q, scale, dtype, "int8")


def onednn(weights: Weights, q: Tensor, scale: Tensor, dtype: torch.dtype) -> Iterator[Candidate]:
    """oneDNN's u8s8 linear, zero point 128. Without VNNI it can saturate; the check tells."""
    k = weights.linear.k
    if q.is_cuda or not hasattr(torch.ops.onednn, "qlinear_prepack"):
        return
    shifted = (q[:, :k].int() + 128).to(torch.uint8)
    ones = torch.ones(weights.linear.n)
    zeros = torch.zeros(weights.linear.n, dtype=torch.int32)
    prepack = torch.ops.onednn.qlinear_prepack
    kept = [prepack(w, list(shifted.shape)) for w in copies(weights.packed8, q.device)]
    columns = scale[:, None], weights.scale.T

    def run(i: int):
        sums = torch.ops.onednn.qlinear_pointwise(
            shifted, 1.0, 128, kept[i % len(kept)], ones, zeros, None, 1.0, 0,
            torch.float32, "none", [], "",
        )  # fmt: skip
        return (sums * columns[0] * columns[1]).to(dtype)

    yield _exact("oneDNN u8s8 + scales", run, weights, q, scale, dtype, "int8")


def _fast_integers(run: Run, x: Tensor) -> Run:
    """`run`, or where torch multiplies integers one at a time (no VNNI), one that says so."""
    if x.is_cuda or torch.cpu._is_vnni_supported():
        return run

    def refuse(_i: int):
        raise RuntimeError("torch has no fast integer product on a CPU without VNNI")

    return refuse


def _exact(name, run, weights: Weights, q: Tensor, scale: Tensor, dtype, kind) -> Candidate:
    """A product of given integers: exact sums, then scales."""
    k, n, tokens = weights.linear.k, weights.linear.n, q.shape[0]

    def check():
        y = run(0)
        rows = rows_of(y)
        want = q[rows, :k].double() @ weights.packed8.double().T
        want = want * scale[rows, None].double() * weights.scale.T.double()
        return gate.floats(y[rows], want, gate.tolerance(dtype, k))

    moved = tokens * k + n * k + dtype.itemsize * tokens * n
    return Candidate(name, run, check, 2 * tokens * k * n, moved, kind, labels={"peer": True})


def fp8(weights: Weights, x: Tensor) -> Iterator[Candidate]:
    """torch._scaled_mm in e4m3 with one scale per tensor, activations quantized beforehand."""
    k, n, tokens = weights.linear.k, weights.linear.n, x.shape[0]
    if not x.is_cuda or torch.cuda.get_device_capability(x.device) < (8, 9) or k % 16 or n % 16:
        return
    largest = torch.finfo(torch.float8_e4m3fn).max

    def scaled(t: Tensor) -> tuple[Tensor, Tensor]:
        scale = t.abs().max().float() / largest
        return (t.float() / scale).to(torch.float8_e4m3fn), scale

    (a, a_scale), (b, b_scale) = scaled(x), scaled(weights.dense(torch.float32))

    def run(_i: int):
        return torch._scaled_mm(a, b.t(), a_scale, b_scale, out_dtype=torch.bfloat16)

    def check():
        y = run(0)
        rows = rows_of(y)
        want = (a[rows].double() @ b.double().T) * a_scale * b_scale
        return gate.floats(y[rows], want, 2 * gate.tolerance(torch.bfloat16, k))

    moved = tokens * k + n * k + 2 * tokens * n
    flops = 2 * tokens * k * n
    yield Candidate(
        "torch._scaled_mm fp8", run, check, flops, moved, "float8", labels={"peer": True}
    )


def composed_int8(weights: Weights, x: Tensor) -> Iterator[Candidate]:
    """W8A8 out of PyTorch's own ops, quantization included: what one writes without a kernel."""
    k, n, tokens = weights.linear.k, weights.linear.n, x.shape[0]
    if x.is_cuda and (tokens <= 16 or k % 8 or n % 8):
        return
    kept = [weights.packed8.t()]
    if not x.is_cuda:
        kept = copies(weights.packed8.t().contiguous(), x.device)
    inverse, columns = weights.smooth_inv[0], weights.scale.T

    def run(i: int):
        u = x * inverse
        scale = u.abs().amax(-1, keepdim=True) / 127
        sums = torch._int_mm((u / scale).round().to(torch.int8), kept[i % len(kept)])
        return (sums * scale * columns).to(x.dtype)

    run = _fast_integers(run, x)

    def check():
        y = run(0)
        rows = rows_of(y)
        want = (x[rows].double() * inverse.double()) @ weights.packed8.double().T
        return gate.floats(y[rows], want * columns.double(), 0.1)

    moved = 2 * x.element_size() * tokens * k + n * k + x.element_size() * tokens * n
    flops = 2 * tokens * k * n
    yield Candidate("PyTorch ops int8", run, check, flops, moved, "int8", labels={"peer": True})


def libraries(weights: Weights, x: Tensor) -> Iterator[Candidate]:
    """gemlite (GPU) and torchao, where importable; they quantize activations themselves."""
    linear = weights.linear
    w = weights.dense(x.dtype)

    def layer(name: str, make, bits: int, limit: float) -> Candidate:
        built: list = []

        def run(_i: int):
            return built[0](x)

        def check():
            with torch.no_grad():
                built.append(make())
                y = run(0)
            rows = rows_of(y)
            want = x[rows].double() @ w.double().T
            return gate.floats(y[rows], want, limit)

        tokens, item = x.shape[0], x.element_size()
        moved = item * tokens * (linear.k + linear.n) + linear.k * linear.n * bits / 8
        flops = 2 * tokens * linear.k * linear.n
        return Candidate(name, run, check, flops, moved, "int8", labels={"peer": True})

    if version("torchao"):
        yield layer("torchao W8A8", lambda: _torchao(w), 8, 0.1)
    if version("gemlite") and x.is_cuda:
        yield layer("gemlite A8W8", lambda: _gemlite8(w), 8, 0.1)
        yield layer("gemlite A8W4", lambda: _gemlite4(weights, x.dtype), 4, 0.1)


def _torchao(w: Tensor):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    module = torch.nn.Sequential(_linear(w))
    quantize_(module, Int8DynamicActivationInt8WeightConfig())
    return torch.no_grad()(module)


def _gemlite8(w: Tensor):
    from gemlite.helper import A8W8_int8_dynamic

    return A8W8_int8_dynamic(device=str(w.device), dtype=w.dtype).from_linear(
        _linear(w), del_orig=False
    )


def _gemlite4(weights: Weights, dtype: torch.dtype):
    from gemlite.helper import A8W4_HQQ_INT_dynamic

    make = A8W4_HQQ_INT_dynamic(device=str(weights.device), dtype=dtype, fp8=torch.int8)
    unsigned = (weights.four + 8).to(torch.uint8)
    return make.from_weights(unsigned, weights.scale.to(dtype), torch.full_like(weights.scale, 8))


def _linear(w: Tensor) -> torch.nn.Linear:
    linear = torch.nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(w.clone(), requires_grad=False)
    return linear
