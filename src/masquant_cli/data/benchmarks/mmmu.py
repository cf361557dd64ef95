"""MMMU: pictures where the text says `<image 1>`, multiple-choice and open questions."""

import re

from masquant_cli.data.media import decode_image
from masquant_cli.data.text import missing_column
from masquant_cli.errors import RecipeError

_MARK = re.compile(r"<image (\d+)>")
_INSTRUCTIONS = {
    "multiple-choice": "Answer with the option's letter from the given choices directly.",
    "open": "Answer the question using a single word or phrase.",
}


def derive(row: dict, where: str) -> dict:
    """`choices`: the lettered options and an empty line, or nothing. `instruction`: what to do."""
    kind = row["question_type"]
    if kind not in _INSTRUCTIONS:
        raise RecipeError(
            f"question_type is {kind!r}, expected {' or '.join(map(repr, _INSTRUCTIONS))}",
            where=where,
        )
    choices = f"{row['lettered']}\n" if kind == "multiple-choice" else ""
    return {"choices": choices, "instruction": _INSTRUCTIONS[kind]}


def interleave(messages: list[dict], row: dict, base: str | None, where: str) -> list[dict]:
    """The messages with column `image_N` in the place of every `<image N>` of their texts."""

    def parts(part: dict) -> list[dict]:
        if part["type"] != "text" or not _MARK.search(part["text"]):
            return [part]
        found = []
        for index, piece in enumerate(_MARK.split(part["text"])):
            if index % 2:
                column = f"image_{piece}"
                if column not in row:
                    raise missing_column(column, row, where)
                found.append({"type": "image", "image": decode_image(row[column], base, where)})
            elif piece.strip():
                found.append({"type": "text", "text": piece.strip()})
        return found

    return [
        {**message, "content": [new for part in message["content"] for new in parts(part)]}
        for message in messages
    ]
