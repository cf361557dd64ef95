"""Questions about one picture: TextVQA, VizWiz and OCRBench."""


def derive(row: dict, where: str) -> dict:
    """`asked`: the question with a capital letter in front and small ones after it."""
    return {"asked": str(row["question"]).capitalize()}


def of_ocrbench(row: dict, where: str) -> dict:
    """`handwritten_mathematics`: whether case counts and white space does not (HME100k)."""
    return {"handwritten_mathematics": row["dataset"] == "HME100k"}
