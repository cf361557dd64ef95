"""The whole configuration surface on one page: frozen models, unknown keys refused.

`recipe_yaml.load` turns a file into a `Recipe`; nothing here reads files or imports torch.
"""

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from masquant_cli import benchmarks

Modality = Literal["text", "vision", "audio", "video"]
SiteKind = Literal["attn_in", "attn_out", "mlp_in", "mlp_out"]
Method = Literal[  # each is the file of that name in methods/; a line here registers it
    "rtn",
    "smoothquant",
    "awq",
    "mbq",
    "omniquant-uniform",
    "text-scales",
    "masquant",
    "masquant-reference",
    "masquant-joint",
]

# Each is scored in stages/scoring.py.
Metric = Literal["accuracy", "wer", "cer", "vqa", "contains", "choice", "mmmu", "perplexity"]

SITE_KINDS: tuple[SiteKind, ...] = ("attn_in", "attn_out", "mlp_in", "mlp_out")


class Frozen(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )


class Model(Frozen):
    """The float model: a folder, a hub id, or `builtin:tiny-omni`."""

    path: str
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


class Part(Frozen):
    """One piece of a chat message. `text` is a template over columns: "Q: {question}"."""

    text: str | None = None
    image: str | None = None  # a column holding an image, path or bytes
    audio: str | None = None
    video: str | None = None  # a column holding a list of frames

    @model_validator(mode="after")
    def _exactly_one(self):
        if sum(v is not None for v in (self.text, self.image, self.audio, self.video)) != 1:
            raise ValueError("a content part names exactly one of text, image, audio, video")
        return self


class Message(Frozen):
    role: Literal["system", "user", "assistant"]
    content: Annotated[tuple[Part, ...], Field(min_length=1)]


class Source(Frozen):
    """Rows of a Hugging Face dataset and how a row becomes chat messages.

    `dataset` is a hub id, a local file or folder of parquet/json/jsonl/csv files,
    `imagefolder:DIR`, `audiofolder:DIR`, or `builtin:tiny-omni/NAME`.
    """

    dataset: str
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = False
    shuffle: bool = True
    limit: Annotated[int, Field(ge=1)] | None = None  # rows, after shuffling
    where: dict[str, str | int | float | bool] = {}  # keep rows whose columns equal these
    messages: Annotated[tuple[Message, ...], Field(min_length=1)]


class Calibration(Frozen):
    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    tokens: dict[Modality, Annotated[int, Field(ge=1)]] = {}  # quota: enough is enough
    min_tokens: Annotated[int, Field(ge=1)] = 256  # warn below, per modality
    max_length: Annotated[int, Field(ge=8)] = 2048  # longer samples are skipped
    batch_tokens: Annotated[int, Field(ge=1)] = 512  # padded tokens per forward pass
    rows: Annotated[int, Field(ge=16)] = 512  # seeded rows kept per site and modality
    gram: tuple[SiteKind, ...] = ("attn_in", "attn_out", "mlp_in")


class Weights(Frozen):
    bits: Literal[4, 8] = 4
    group_size: Annotated[int, Field(ge=8)] | None = None  # None: one scale per output channel
    symmetric: bool = True
    rounding: Literal["auto", "nearest", "gptq"] = "auto"  # of the base weight; auto: the method's

    @property
    def form(self) -> tuple[int, int | None, bool]:
        """What a quantizer wants to know: bits, group size, symmetric."""
        return self.bits, self.group_size, self.symmetric

    @model_validator(mode="after")
    def _asymmetric_needs_int4(self):
        if not self.symmetric and self.bits != 4:
            raise ValueError("asymmetric weights are supported at 4 bits only")
        return self


class Activations(Frozen):
    bits: Literal[4, 6, 8, 16] = 8  # symmetric, dynamic, one scale per token; 16 keeps floats


class Smoothing(Frozen):
    """How a method chooses scales; each reads what its file in methods/ says it reads."""

    beta: Annotated[float, Field(ge=0, le=1)] = 0.5  # eq. 8; eq. 12 is beta = 0.5
    learn: bool = True  # False: the closed form alone
    objective: Literal["linear", "block"] = (
        "linear"  # error of a linear (eq. 14) | of a whole layer
    )
    epochs: Annotated[int, Field(ge=0)] = 10  # passes over the kept rows, or over `samples`
    learning_rate: Annotated[float, Field(gt=0)] = 0.05
    batch_rows: Annotated[int, Field(ge=1)] = 64
    heldout: Annotated[float, Field(gt=0, lt=1)] = 0.25  # share of the rows that only judges
    samples: Annotated[int, Field(ge=1)] = 128  # objective block, and gradients of mbq
    loss_weights: dict[Modality, Annotated[float, Field(ge=0)]] = {}  # lambda_m, default 1

    @field_validator("objective", mode="before")
    @classmethod
    def _renamed(cls, objective):
        if objective in ("joint", "mas"):
            method = "masquant-joint" if objective == "joint" else "masquant"
            raise ValueError(f"{objective!r} is a method now: method={method}")
        return objective


class Compensation(Frozen):
    """Low-rank correction per site and non-base modality (eq. 22-26)."""

    rank: float = 0.05  # 0: off; below 1: ratio of min(in, out); otherwise absolute
    sites: tuple[SiteKind, ...] = SITE_KINDS
    whiten: bool = True
    target: Literal["float", "quantized"] = "float"  # the residual reaches for S_m W | Q(S_m W)

    @field_validator("rank")
    @classmethod
    def _rank(cls, rank: float) -> float:
        if rank < 0 or (rank >= 1 and rank != int(rank)):
            raise ValueError("rank is 0 (off), a ratio below 1, or a whole number of columns")
        return rank


class Export(Frozen):
    verify: bool = True  # reload in a fresh process and compare logits
    tolerance: Annotated[float, Field(gt=0)] = 1e-3  # relative, on logits in fp32


class Task(Frozen):
    """One evaluation: rows, a prompt, the expected answer and a metric.

    With `benchmark` all of it comes from that name's line in benchmarks.py; what is given here
    overrides it.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    benchmark: str | None = None
    dataset: str | None = None  # of a benchmark: shorthand for source.dataset, then None
    split: str | None = None  # likewise
    prompt: str | None = None  # likewise: the user's text
    metric: Metric
    source: Source
    answer: str | None = None  # template of the reference; not used by perplexity
    options: str | None = None  # metrics choice and mmmu: the column of the options
    normaliser: Literal["plain", "whisper"] = "plain"  # metric wer: of both texts
    window: Annotated[int, Field(ge=2)] | None = None  # perplexity: tokens of running text
    samples: Annotated[int, Field(ge=1)] | None = None
    max_new_tokens: Annotated[int, Field(ge=1)] = 16

    @model_validator(mode="before")
    @classmethod
    def _from_benchmark(cls, given):
        return benchmarks.expand(given) if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _fits_its_metric(self):
        if self.metric != "perplexity" and self.answer is None:
            raise ValueError(f"metric {self.metric} needs an `answer` template")
        if self.metric in ("choice", "mmmu") and self.options is None:
            raise ValueError(f"metric {self.metric} needs `options`, the column that holds them")
        if self.window is not None and self.metric != "perplexity":
            raise ValueError(f"`window` is for metric perplexity, not {self.metric}")
        if self.normaliser != "plain" and self.metric != "wer":
            raise ValueError(f"`normaliser` is for metric wer, not {self.metric}")
        return self


class Evaluation(Frozen):
    tasks: tuple[Task, ...] = ()
    fidelity_samples: Annotated[int, Field(ge=0)] = 64  # SQNR, KL, flips; 0 turns them off
    batch_size: Annotated[int, Field(ge=1)] = 16

    @field_validator("tasks")
    @classmethod
    def _unique(cls, tasks: tuple[Task, ...]) -> tuple[Task, ...]:
        names = [t.name for t in tasks]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two tasks are called {name!r}")
        return tasks


class Bench(Frozen):
    prompt_tokens: Annotated[int, Field(ge=1)] = 256
    new_tokens: Annotated[int, Field(ge=1)] = 32
    batch_size: Annotated[int, Field(ge=1)] = 1
    repeats: Annotated[int, Field(ge=1)] = 5


_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]i?)B")


class Resources(Frozen):
    """What a run may use. It changes how results come about, never which."""

    max_memory: str | None = None  # "6GB"

    @field_validator("max_memory", mode="before")
    @classmethod
    def _is_a_size(cls, value: object) -> object:
        if value is None:
            return None
        size = _SIZE.fullmatch(str(value))
        if not size or not float(size[1]):
            raise ValueError(f"{value!r} is not a size: 6GB and 4.5GiB are")
        return value

    @property
    def max_bytes(self) -> int | None:
        """`max_memory` in bytes: GB are 10^9, GiB 2^30. None: what the machine has."""
        if self.max_memory is None:
            return None
        number, unit = _SIZE.fullmatch(self.max_memory).groups()
        return int(float(number) * (1024 if "i" in unit else 1000) ** ("KMGT".index(unit[0]) + 1))


class Recipe(Frozen):
    """One job. The first modality is the base: its smoothing shapes the stored weight."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    seed: Annotated[int, Field(ge=0)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU when there is one
    model: Model
    modalities: Annotated[tuple[Modality, ...], Field(min_length=1)] = ("text", "vision", "audio")
    calibration: Calibration
    method: Method = "masquant-joint"
    weights: Weights = Weights()
    activations: Activations = Activations()
    smoothing: Smoothing = Smoothing()
    compensation: Compensation = Compensation()
    export: Export = Export()
    evaluation: Evaluation = Evaluation()
    bench: Bench = Bench()
    resources: Resources = Resources()

    @model_validator(mode="after")
    def _modalities(self):
        if len(set(self.modalities)) != len(self.modalities):
            raise ValueError("a modality is listed twice")
        if self.modalities[0] != "text":
            raise ValueError("the first modality is the base, which only text can be")
        named = (self.calibration.tokens, self.smoothing.loss_weights)
        for unknown in {m for d in named for m in d} - set(self.modalities):
            raise ValueError(f"{unknown!r} is not among modalities {list(self.modalities)}")
        return self
