"""Chat prompts as token ids, exactly as the processor's template writes them."""

from dataclasses import dataclass

import torch
from spec import QUESTIONS, TEXT_TRAIN, WORDS

PICTURE_TOKENS = 4


@dataclass(frozen=True)
class Sample:
    """One question: ids without media embeddings, rows into the pools, and the answer."""

    task: str
    ids: tuple
    answer: tuple
    picture: int | None = None
    clip: int | None = None


class Prompts:
    def __init__(self, tokenizer):
        self.tokenizer, self.cache = tokenizer, {}
        self.image = tokenizer.image_token_id
        self.audio = tokenizer.audio_token_id
        self.pad = tokenizer.pad_token_id

    def encode(self, text: str) -> tuple:
        if text not in self.cache:
            self.cache[text] = tuple(self.tokenizer(text)["input_ids"])
        return self.cache[text]

    def ask(self, question: str, picture: bool = False, clip_tokens: int = 0) -> tuple:
        media = ""
        if picture:
            media += "<|vision_bos|>" + "<|IMAGE|>" * PICTURE_TOKENS + "<|vision_eos|>"
        if clip_tokens:
            media += "<|audio_bos|>" + "<|AUDIO|>" * clip_tokens + "<|audio_eos|>"
        return self.encode(
            f"<|im_start|>user\n{media}{question}<|im_end|>\n<|im_start|>assistant\n"
        )

    def answer(self, text: str) -> tuple:
        return self.encode(f"{text}<|im_end|>")


def positions(ids, image: int):
    """The three rotary position rows for one prompt: a 2x2 picture advances them by two."""
    rows, following, at = [], 0, 0
    while at < len(ids):
        if ids[at] == image:
            for place in range(PICTURE_TOKENS):
                rows.append((following, following + place // 2, following + place % 2))
            following += 2
            at += PICTURE_TOKENS
        else:
            rows.append((following,) * 3)
            following += 1
            at += 1
    return torch.tensor(rows).T


class Maker:
    """Draw samples of a task from the pools of one split."""

    def __init__(self, prompts: Prompts, pictures, speech, templates=TEXT_TRAIN):
        self.prompts, self.templates = prompts, templates
        self.labels = pictures[1].tolist()
        _, self.offsets, self.digits = speech
        self.singles = [row for row, digits in enumerate(self.digits) if len(digits) == 1]
        self.several = [row for row, digits in enumerate(self.digits) if len(digits) > 1]

    def draw(self, task: str, rng) -> Sample:
        words, prompts = WORDS, self.prompts
        picture = clip = None
        count = 0
        if task in ("picture", "sum"):
            picture = int(rng.integers(len(self.labels)))
        if task in ("speech", "transcription", "sum"):
            rows = self.several if task == "transcription" else self.singles
            clip = rows[int(rng.integers(len(rows)))]
            count = self.offsets[clip + 1] - self.offsets[clip]
        if task == "text":
            a, b = (int(n) for n in rng.integers(0, 10, 2))
            question = self.templates[int(rng.integers(len(self.templates)))]
            question = question.format(a=words[a], b=words[b])
            question = question[0].upper() + question[1:] if rng.random() < 0.5 else question
            reply = words[a + b]
        else:
            question = QUESTIONS[task][int(rng.integers(len(QUESTIONS[task])))]
            seen = self.labels[picture] if picture is not None else 0
            heard = self.digits[clip] if clip is not None else []
            reply = {
                "picture": lambda: words[seen],
                "speech": lambda: words[heard[0]],
                "transcription": lambda: " ".join(words[d] for d in heard),
                "sum": lambda: words[seen + heard[0]],
            }[task]()
        ids = prompts.ask(question, picture is not None, count)
        return Sample(task, ids, prompts.answer(reply), picture, clip)
