"""How a generated answer is compared with the expected ones: pure functions of texts.

VQA accuracy, containment, multiple choice, MMMU's open questions and characters for CER.
"""

import re
import unicodedata
from collections.abc import Sequence

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# What VQA's evaluation takes for a contraction when its apostrophes are missing.
_WHOLE = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've "
    "hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am "
    "mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't shan't "
    "she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's "
    "someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've "
    "'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd "
    "where's where've who'd who'd've who'll who's who've why'll why're why's won't would've "
    "wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"
)
_CONTRACTIONS = {whole.replace("'", ""): whole for whole in _WHOLE.split()}
_NAMES = "zero one two three four five six seven eight nine ten"
_DIGITS = {"none": "0"} | {name: str(digit) for digit, name in enumerate(_NAMES.split())}
_ARTICLES = ("a", "an", "the")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`!'


def vqa_normal(text: str) -> str:
    """An answer as VQA compares it: lower case, no articles, numbers up to ten as digits,
    apostrophes of contractions restored, punctuation dropped.

    A mark that touches a space is dropped, one between two letters becomes a space; full stops
    stay before a digit only. "The two-tone dogs." -> "2 tone dogs".
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = before = text.replace("\n", " ").replace("\t", " ").strip()
    for mark in _PUNCTUATION:
        loose = f"{mark} " in before or f" {mark}" in before
        text = text.replace(mark, "" if loose else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = (_DIGITS.get(word, word) for word in text.split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """mean over annotators i of min(1, #{j != i: answer_j = prediction} / 3), in [0, 1]."""
    said = vqa_normal(prediction)
    same = [vqa_normal(answer) == said for answer in answers]
    total = sum(same)
    return sum(min(1.0, (total - own) / 3) for own in same) / len(same)


def contains(prediction: str, answers: Sequence[str], *, literal: bool = False) -> bool:
    """Whether any answer is part of the prediction, as OCRBench asks.

    Case and full-width forms do not count; with `literal`, for handwritten mathematics, case
    does and white space does not.
    """

    def normal(text: str) -> str:
        text = text.strip().replace("\n", " ")
        return text.replace(" ", "") if literal else half_width(text).lower().strip()

    said = normal(prediction)
    return any(normal(answer) in said for answer in answers)


def half_width(text: str) -> str:
    """Full-width ASCII and the ideographic space as their narrow forms, nothing else."""
    return "".join(
        chr(ord(c) - 0xFEE0) if "\uff01" <= c <= "\uff5e" else " " if c == "\u3000" else c
        for c in text
    )


def characters(text: str) -> str:
    """What a character error rate counts: NFKC, lower case, letters, digits and marks only."""
    text = unicodedata.normalize("NFKC", text).lower()
    return "".join(c for c in text if unicodedata.category(c)[0] in "LNM")


def option_letter(text: str, options: Sequence[str]) -> str | None:
    """The letter that a multiple-choice answer settles on, None when it names no option.

    In this order: a letter in front ("B", "b.", "(B) because"), the last one in brackets, the
    last one that stands alone (but not the article of "A dog"), the option whose text is
    quoted last.
    """
    letters = LETTERS[: len(options)]
    if not letters:
        return None
    text = text.strip()
    alone = re.fullmatch(r"[(\[*]*([A-Za-z])[)\]*]*[.:,;!]?", text)
    front = re.match(rf"\(?([{letters}])[).:,](?:\s|$)", text)
    for match in (alone, front):
        if match and match[1].upper() in letters:
            return match[1].upper()
    if found := re.findall(rf"\(([{letters}])\)", text):
        return found[-1]
    if found := re.findall(rf"(?<![A-Za-z'’])(?!A [a-z])([{letters}])(?![A-Za-z'’])", text):
        return found[-1]
    spoken = text.lower()
    # Of options inside one another ("red", "dark red") the longest is meant.
    ends = [
        (spoken.rfind(option) + len(option), len(option), letter)
        for letter, option in zip(letters, (o.strip().lower() for o in options), strict=True)
        if option and option in spoken
    ]
    return max(ends)[2] if ends else None


_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


def open_accuracy(prediction: str, answers: Sequence[str]) -> bool:
    """MMMU's open questions: whether an expected number, to two decimals, is among those after
    "is", "answer", "=" and the like, or an expected text is part of what stands there."""
    found = _statements(prediction)
    wanted = [form for answer in answers for form in _forms(answer)]
    return any(
        said in wanted
        if isinstance(said, float)
        else any(isinstance(w, str) and w in said for w in wanted)
        for said in found
    )


def _statements(text: str) -> list[str | float]:
    """The ends of the lines that state a result, and the numbers in them."""
    lines = text.strip().strip(".").lower().split("\n")
    ends = []
    for index, line in enumerate(lines):
        keys = (*_KEYS, "=") if index == len(lines) - 1 else _KEYS
        tails = [line.split(key)[-1].strip() for key in keys if key in line]
        shortest = min((tail for tail in tails if tail), key=len, default="")
        if shortest not in ("", *":,.!?;'"):
            ends.append(shortest)
    ends = ends or ["\n".join(lines)]
    numbers = [n for end in ends for pattern in _NUMBERS for n in re.findall(pattern, end)]
    return [form for item in (*ends, *numbers) for form in _forms(item)]


def _forms(text: str) -> list[str | float]:
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]
