"""ScienceQA: a hint only some questions have, and in its full form a picture likewise."""


def derive(row: dict, where: str) -> dict:
    """`context`: the hint on its own line, or nothing. `image`: an empty list without a picture."""
    hint = (row["hint"] or "").strip()
    image = [] if row["image"] is None else row["image"]
    return {"context": f"Context: {hint}\n" if hint else "", "image": image}
