"""What tiny-omni is asked and how it is shaped: words, phrasings, sizes and folders.

Read this first. Everything a run depends on is a constant here; nothing is read from outside
the repository.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
DATA = HERE / "data"
ASSETS = REPO / "src" / "masquant_cli" / "assets" / "tiny-omni"
sys.path[:0] = [str(REPO / "src"), str(REPO / "kernels")]  # a checkout need not be installed

WORDS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
]

TASKS = ("picture", "speech", "transcription", "sum", "text")

QUESTIONS = {
    "picture": (
        "What digit is in the picture?",
        "Which digit does the picture show?",
        "Name the digit in the picture.",
    ),
    "speech": (
        "What digit do you hear?",
        "Which digit is spoken?",
        "Name the digit in the recording.",
    ),
    "transcription": (
        "Transcribe the digits.",
        "Write down the digits you hear.",
        "What digits are spoken, in order?",
    ),
    "sum": (
        "What is the sum of the digit you see and the digit you hear?",
        "Add the digit in the picture to the spoken digit.",
        "What is the pictured digit plus the spoken digit?",
    ),
}

TEXT_TRAIN = (
    "What is {a} plus {b}?",
    "{a} plus {b} is what?",
    "Add {a} and {b}.",
    "Please add {a} to {b}.",
    "What do you get when you add {a} and {b}?",
    "Compute {a} plus {b}.",
    "Tell me the sum of {a} and {b}.",
    "The sum of {a} and {b} is?",
    "How much is {a} plus {b}?",
    "Work out {a} plus {b}.",
    "Sum {a} and {b}.",
    "If you have {a} and get {b} more, how many do you have?",
    "I have {a} apples and buy {b} more. How many apples do I have?",
    "{a} and {b} together make what?",
    "What number is {a} more than {b}?",
    "Start with {a}, then add {b}. What is the result?",
    "Give the total of {a} and {b}.",
    "Take {a} and add {b} to it.",
    "Put {a} and {b} together. What is the total?",
    "What is the total when {a} is added to {b}?",
    "Can you add {a} and {b} for me?",
    "Calculate {a} plus {b}, please.",
    "{a} birds and {b} birds make how many birds?",
    "Find the result of {a} plus {b}.",
)

# Never seen in training; the tokenizer is not trained on them either.
TEXT_HELD_OUT = (
    "What is the result when you add {a} to {b}?",
    "Please tell me how much {a} and {b} make.",
    "I get {a} and then {b} more. What is the total?",
    "Find the sum: {a} and {b}.",
    "How many are {a} apples plus {b} apples?",
    "Give me {a} plus {b}, please.",
)

VOCAB = 640
HIDDEN = 256
LAYERS = 4
RATE = 16_000  # of the model; the recordings are stored at 8 kHz
HOP = 320  # 50 mel frames a second; the tower keeps one token for four of them
CLIP = 4 * RATE  # the longest clip the feature extractor takes


def digits_answer(digits) -> str:
    return " ".join(WORDS[d] for d in digits)


def audio_tokens(frames: int) -> int:
    """Tokens the audio tower makes of `frames` mel frames (a stride-2 convolution, then a pool)."""
    return ((frames - 1) // 2 + 1 - 2) // 2 + 1
