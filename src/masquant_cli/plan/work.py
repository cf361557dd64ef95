"""The tapes of every stage: the stages' own functions, run on meta tensors for one layer of each
kind there is.

Two things cannot run without numbers and are told what to do: an iteration that ends when the data
say so (it takes the blocks that its own estimate expects), and GPTQ, whose thousands of small steps
are timed as a whole. What a layer's forward costs is taken from its linears.
"""

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from masquant_cli.algo import low_rank
from masquant_cli.algo.gptq import outputs_at_once
from masquant_cli.algo.linear import compensated_linear
from masquant_cli.algo.site import SiteProblem
from masquant_cli.algo.statistics import InputStatistics
from masquant_cli.methods import find
from masquant_cli.methods.method import Layer
from masquant_cli.models.sites import LayerSites, Site
from masquant_cli.plan.tape import Call, Shape, Tape, record
from masquant_cli.runtime.pack import export_tensors
from masquant_cli.stages import base_weight, compensate, reference
from masquant_cli.stages.coverage import keeps_gram, rows_kept
from masquant_cli.stages.job import Job
from masquant_cli.stages.smooth import READ, site_problem

META = torch.device("meta")
COPIES = 10  # of the weights that GPTQ has in work
TAPED_EPOCHS = 2  # those after the first are all alike


class PlannedJob(Job):
    """A job whose weights and statistics have shapes and no numbers."""

    def weight(self, site: Site) -> Tensor:
        return torch.cat([self.linear(site, o) for o in site.out_features])

    @staticmethod
    def linear(site: Site, out: int) -> Tensor:
        return torch.empty(out, site.in_features, device=META)


@dataclass(frozen=True)
class Kind:
    """Decoder layers that cost alike: the first of them, and how many there are."""

    layer: LayerSites
    count: int


def kinds(layers: Sequence[LayerSites]) -> list[Kind]:
    found: dict[tuple, list[LayerSites]] = {}
    for layer in layers:
        key = tuple((s.key, s.in_features, s.out_features) for s in layer.sites)
        found.setdefault(key, []).append(layer)
    return [Kind(alike[0], len(alike)) for alike in found.values()]


def statistics(job: Job, site: Site, tokens: Mapping[str, int]) -> dict[str, Tensor]:
    """What calibrate keeps of a site, by shape; counts are real."""
    found = {}
    for name in job.recipe.modalities:
        key, width = f"{site.key}.{name}", site.in_features
        rows = min(rows_kept(site, job.recipe.calibration), tokens[name])
        found[f"{key}.absmax"] = torch.empty(width, device=META)
        found[f"{key}.mean_abs"] = torch.empty(width, device=META)
        found[f"{key}.count"] = torch.tensor([tokens[name]])
        found[f"{key}.rows"] = torch.empty(rows, width, device=META)
        if keeps_gram(site, job.recipe.calibration):
            found[f"{key}.gram"] = torch.empty(width, width, device=META)
    return found


def forward(job: Job, layer: LayerSites, samples: int, tokens: int) -> Tape:
    """One decoder layer on a batch [samples, tokens]: its linears as they are, its attention as one
    operation, its norms and activations about as they are."""
    config = job.float.config.get_text_config()
    dtype, n = job.float.dtype, samples * tokens
    with record() as recorder, torch.no_grad():
        hidden = torch.empty(n, config.hidden_size, dtype=dtype, device=META)
        for _ in range(2):  # norm, residual
            wide = hidden.float()
            normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(dtype)
            _ = hidden + normed * hidden[0]
        for site, share in _routed(layer, config):
            x = torch.empty(max(1, int(n * share)), site.in_features, dtype=dtype, device=META)
            outs = []
            for out in site.out_features:
                weight = torch.empty(out, site.in_features, dtype=dtype, device=META)
                outs.append(F.linear(x, weight))
            if site.kind == "mlp_in":
                _ = F.silu(outs[0]) * outs[-1]
            if site.kind == "attn_in":
                _attention(recorder.tape, config, outs, samples, tokens)
        return recorder.tape


def _routed(layer: LayerSites, config) -> Iterator[tuple[Site, float]]:
    """Sites and the share of tokens that reach them; experts' inputs as one of each expert."""
    experts = max(1, sum(s.expert is not None for s in layer.sites))
    chosen = getattr(config, "num_experts_per_tok", None) or 1
    for site in layer.sites:
        if site.experts is None:
            yield site, 1.0
        elif site.expert is not None:
            yield site, chosen / experts
        else:  # gate and up of all experts read one input
            yield site, chosen / (len(site.out_features) / 2)


def _attention(tape: Tape, config, outs: list[Tensor], samples: int, tokens: int) -> None:
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    q = torch.empty(samples, heads, tokens, width, dtype=outs[0].dtype, device=META)
    half = torch.empty_like(q[..., : width // 2])
    for _ in range(2):  # rotary embedding of q, and of k repeated
        _ = q * q[:1] + torch.cat((-half, half), -1) * q[:1]
    shape = Shape(tuple(q.shape), q.stride(), q.dtype)
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    tape.calls[Call(op, ((shape, shape, shape, 0.0, True), ()))] += 1


def gathered(job: Job, layer: LayerSites, mix: Mapping[str, int]) -> Tape:
    """The statistics of a batch with `mix` tokens of each modality."""
    with record() as recorder, torch.no_grad():
        for site in layer.sites:
            if site.expert is not None:
                continue
            for name in job.recipe.modalities:
                kept = InputStatistics(
                    width=site.in_features,
                    keep=rows_kept(site, job.recipe.calibration),
                    with_gram=keeps_gram(site, job.recipe.calibration),
                    device=META,
                )
                x = torch.empty(mix[name], site.in_features, dtype=job.float.dtype, device=META)
                kept.update(x, torch.rand(mix[name], dtype=torch.float64))
        return recorder.tape


def solved(job: Job, layer: LayerSites, tokens: Mapping[str, int]) -> Tape:
    """smooth on one layer. Methods that look at whole layers or gradients: `looks_at_layers`; of
    one that does nothing else the tape is empty."""
    if "block" in find(job.recipe.method).needs:
        return Tape()
    epochs = job.recipe.smoothing.epochs if job.recipe.smoothing.learn else 0
    few = _solved(job, layer, tokens, min(epochs, TAPED_EPOCHS))
    if epochs <= TAPED_EPOCHS:
        return few
    fewer = _solved(job, layer, tokens, TAPED_EPOCHS - 1)
    return few.plus(Tape(few.calls - fewer.calls, few.peak), epochs - TAPED_EPOCHS)


def _solved(job: Job, layer: LayerSites, tokens: Mapping[str, int], epochs: int) -> Tape:
    options = job.recipe.smoothing.model_copy(update={"epochs": epochs, "objective": "linear"})
    recipe = job.recipe.model_copy(update={"smoothing": options})
    planned = PlannedJob(recipe, job.progress)
    planned.float, planned.layers = job.float, job.layers
    found = Tape()
    for sites, times in _alike(layer):
        with _without_numbers() as recorder:
            find(recipe.method).solve(
                Layer(
                    modalities=recipe.modalities,
                    sites=_Problems(planned, sites, tokens),
                    smoothing=options,
                    seeds={site.key: 0 for site in sites},
                    sensitivity=lambda sites=sites: _equal(planned, sites),
                    block=_refuse,
                )
            )
        found = found.plus(recorder.tape, times)
    return found


class _Problems(Mapping):
    """The problems of a layer's sites by key, made when asked for: memory is that of one."""

    def __init__(self, job: Job, sites: Sequence[Site], tokens: Mapping[str, int]):
        self.job, self.tokens, self.sites = job, tokens, {site.key: site for site in sites}

    def __getitem__(self, key: str) -> SiteProblem:
        site = self.sites[key]
        known = statistics(self.job, site, self.tokens)
        return site_problem(self.job, site, {k: t for k, t in known.items() if k.endswith(READ)})

    def __iter__(self):
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)


def _equal(job: Job, sites: Sequence[Site]) -> dict[str, Tensor]:
    return {site.key: torch.ones(len(job.recipe.modalities)) for site in sites}


def _refuse():
    raise NotImplementedError("whole layers are not run on shapes")


def compensated(job: Job, layer: LayerSites, tokens: Mapping[str, int]) -> tuple[Tape, int]:
    """compensate on one layer, and the bytes of the tensors it writes."""
    found, nbytes = Tape(), 0
    for alike, times in _alike(layer):
        sites = [site for site in alike if compensate.is_needed(job, site)]
        with _without_numbers() as recorder:
            tensors: dict[str, Tensor] = {}
            for site in sites:
                scale = torch.empty(len(job.recipe.modalities), site.in_features, device=META)
                known = statistics(job, site, tokens)
                compensate._site(job, site, known, scale, tensors, {})
            nbytes += times * sum(t.nbytes for t in tensors.values())
            found = found.plus(recorder.tape, times)
    return found, nbytes


def packed(job: Job, layer: LayerSites) -> Tape:
    """export's packing of one layer."""
    found, scheme = Tape(), job.scheme
    integers = job.rounding == "gptq"
    for sites, times in _alike(layer):
        with record() as recorder, torch.no_grad():
            for site in sites:
                scale = torch.empty(len(scheme.modalities), site.in_features, device=META)
                weights = (job.linear(site, out) for out in site.out_features)
                shape = (sum(site.out_features), site.in_features)
                q = torch.empty(shape, dtype=torch.int8, device=META) if integers else None
                with contextlib.suppress(NotImplementedError, RuntimeError):  # .cpu() at its end
                    export_tensors(site, weights, scale, {}, scheme, q)
            found = found.plus(recorder.tape, times)
    return found


def verified(job: Job, layer: LayerSites, tokens: int) -> Tape:
    """What verification computes of a layer on so many tokens: the reference, whose layer is in
    memory as it was and rounded, and the export's linears, which take about as long."""
    recipe, held = job.recipe, []
    with record() as recorder, torch.no_grad():
        for site, share in _routed(layer, job.float.config.get_text_config()):
            scale = torch.empty(len(recipe.modalities), site.in_features, device=META)
            n = max(1, int(tokens * share))
            x = torch.empty(n, site.in_features, device=META)
            ids = torch.empty(n, dtype=torch.int64, device=META)
            for out in site.out_features:
                held.append(job.linear(site, out))
                base = reference._rounded(held[-1], scale[0], recipe.weights)
                held += [base, torch.empty_like(base.q) if job.rounding != "nearest" else None]
                for _ in range(2):
                    compensated_linear(x, ids, base, scale, recipe.activations.bits, {})
    return recorder.tape


def looks_at_layers(job: Job) -> bool:
    """Whether the method runs the model again, which no tape shows."""
    return bool(find(job.recipe.method).prepared(job.recipe.smoothing))


def _alike(layer: LayerSites) -> list[tuple[tuple[Site, ...], int]]:
    """The layer's sites, and one expert in the place of all that cost alike."""
    plain = tuple(s for s in layer.sites if s.expert is None)
    found: dict[tuple, list[Site]] = {}
    for site in layer.sites:
        if site.expert is not None:
            found.setdefault((site.kind, site.in_features, site.out_features), []).append(site)
    return [(plain, 1), *(((alike[0],), len(alike)) for alike in found.values())]


@contextlib.contextmanager
def _without_numbers() -> Iterator:
    """Record what functions do that look at numbers."""
    eigenvectors, gptq = low_rank.top_eigenvectors, base_weight.gptq_round
    error = base_weight.base_error
    with record() as recorder:

        def blocks(*args, **kwargs):
            # What a block captures grows until the last one adds nothing.
            steps = [1 - 0.5 / n for n in range(1, low_rank.BLOCKS)]
            recorder.scalars[:] = [*steps, steps[-1]]
            try:
                return eigenvectors(*args, **kwargs)
            finally:
                recorder.scalars.clear()

        def rounded(weight, gram, *form, rows=None, **options):
            shapes = tuple(
                None if t is None else Shape(tuple(t.shape), t.stride(), t.dtype)
                for t in (weight, gram, rows)
            )
            recorder.tape.calls[Call(gptq, (*shapes, form))] += 1
            # What GPTQ says that it holds beside the Gram, and a chunk in work.
            width = weight.shape[1]
            chunk = outputs_at_once(width, torch.device("cpu"))
            held = 8 * width * ((2 * width) if rows is None else 2 * len(rows))
            recorder.use(held + COPIES * 4 * width * min(chunk, len(weight)))
            return base_weight.quantize_weight(weight, *form)

        asked = itertools.count()

        def judged(*args):
            error(*args)
            return -next(asked)  # the last candidate wins: GPTQ, as nearly always

        low_rank.top_eigenvectors, base_weight.gptq_round = blocks, rounded
        base_weight.base_error = judged
        try:
            yield recorder
        finally:
            low_rank.top_eigenvectors, base_weight.gptq_round = eigenvectors, gptq
            base_weight.base_error = error


def linears_outside(model: nn.Module, layers: str) -> list[tuple[int, int]]:
    """(out, in) of the linears of towers and the like: what embedding runs besides look-ups."""
    head = model.get_output_embeddings()
    return [
        tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and not name.startswith(layers)
    ]
