"""Where the paper's ordering holds in what was measured, and where it does not: from numbers alone.

A claim is checked on every place (a model or layer, at some bits) that has its rows.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

OWN = "a weight per modality"  # no method: layers are measured this way too
MARGIN = 0.5  # dB: less is a tie, and a tie holds for nobody

Row = Mapping[str, float]  # SQNR in dB by modality
Rows = Mapping[str, Row]  # by method label


@dataclass(frozen=True)
class Claim:
    """`check` gives (left, right) in dB of one place, or None where rows are missing; the claim
    holds where left - right >= MARGIN. `said` names the two: "text: {right} -> {left} dB"."""

    title: str
    check: Callable[[Rows], tuple[float, float] | None]
    left: str
    right: str


@dataclass(frozen=True)
class Verdict:
    place: str
    left: float
    right: float

    @property
    def holds(self) -> bool:
        return self.left - self.right >= MARGIN


def worst(row: Row) -> float:
    return min(row.values())


def corrected(row: Row) -> float:
    """Mean over the modalities that a correction serves."""
    return sum(v for m, v in row.items() if m != "text") / (len(row) - 1)


def _between(left: str, right: str, of: Callable[[Row], float]):
    def check(rows: Rows) -> tuple[float, float] | None:
        if left not in rows or right not in rows:
            return None
        return of(rows[left]), of(rows[right])

    return check


def text(row: Row) -> float:
    return row["text"]


CLAIMS = (
    Claim(
        "Uniform smoothing loses the modality that does not dominate",
        _between("text-scales", "smoothquant", text),
        "text under its own scales",
        "text under SmoothQuant's",
    ),
    Claim(
        "Uniform smoothing is worse than none for its worst modality",
        _between("rtn", "smoothquant", worst),
        "worst modality of rtn",
        "of SmoothQuant",
    ),
    Claim(
        "Scales per modality recover it, if each had a quantized weight of its own",
        _between(OWN, "smoothquant", worst),
        "worst modality with a weight each",
        "of SmoothQuant",
    ),
    Claim(
        "MASQuant as the paper has it recovers the worst modality",
        _between("masquant", "smoothquant", worst),
        "worst modality of masquant",
        "of SmoothQuant",
    ),
    Claim(
        "MASQuant beats MBQ in the worst modality",
        _between("masquant", "mbq", worst),
        "worst modality of masquant",
        "of mbq",
    ),
    Claim(
        "A correction beats none",
        _between("text-scales+cmc", "text-scales", corrected),
        "vision and audio with CMC",
        "without",
    ),
    Claim(
        "Choosing the scales for the deployed form (masquant-joint) beats the paper's choice",
        _between("masquant-joint", "masquant", worst),
        "worst modality of masquant-joint",
        "of masquant",
    ),
    Claim(
        "GPTQ rounding beats nearest under masquant-joint",
        _between("masquant-joint", "masquant-joint+nearest", worst),
        "worst modality with gptq",
        "with nearest",
    ),
)

WHITENING = Claim(
    "Whitening beats none",
    _between("whitened", "not whitened", corrected),
    "vision and audio whitened",
    "not whitened",
)


def verdicts(claim: Claim, places: Mapping[str, Rows]) -> list[Verdict]:
    """One per place that has the claim's rows, in order."""
    found = ((place, claim.check(rows)) for place, rows in places.items())
    return [Verdict(place, *pair) for place, pair in found if pair is not None]


def sentence(claim: Claim, found: Iterable[Verdict]) -> str:
    """The claim, where it holds and where it does not, with the numbers, as a Markdown item."""
    found = list(found)
    if not found:
        return f"- **{claim.title}**: not measured."
    yes, no = [v for v in found if v.holds], [v for v in found if not v.holds]
    head = f"- **{claim.title}**: "
    if not no:
        head += f"holds in all {len(found)} places."
    elif not yes:
        head += f"does not hold in any of {len(found)} places."
    else:
        head += f"holds in {len(yes)} of {len(found)} places."
    lines = [head, f"  <details><summary>In dB, {claim.left} against {claim.right}</summary>", ""]
    for name, group in (("holds", yes), ("does not", no)):
        if group:
            said = "; ".join(f"{v.place} {v.left:.1f} against {v.right:.1f}" for v in group)
            lines.append(f"  - {name}: {said}.")
    return "\n".join([*lines, "", "  </details>"])
