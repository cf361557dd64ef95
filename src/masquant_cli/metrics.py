"""What is known of each metric of `recipe.Metric`, for tables and figures; plain data."""

from typing import NamedTuple


class Metric(NamedTuple):
    name: str
    higher: bool | None = None  # is better; None: not known
    unit: str = ""
    short: str = ""  # beside a task's name where its score is not a share of right answers

    @property
    def label(self) -> str:
        """Of an axis."""
        return f"{self.name} ({self.unit})" if self.unit else self.name


METRICS = {
    "accuracy": Metric("accuracy", True, "%"),
    "wer": Metric("WER", False, "%", "WER"),
    "cer": Metric("CER", False, "%", "CER"),
    "vqa": Metric("VQA accuracy", True, "%", "VQA"),
    "contains": Metric("answers contained", True, "%"),
    "choice": Metric("accuracy", True, "%"),
    "mmmu": Metric("MMMU accuracy", True, "%"),
    "perplexity": Metric("perplexity", False, "", "perplexity"),
}


def of(metric: str) -> Metric:
    """That of `metric`; one whose name alone is known for what is not a recipe's."""
    return METRICS.get(metric) or Metric(metric, short=metric)


def head(task: str, metric: str) -> str:
    """A column's: the task, and how it is scored where that is no share of right answers."""
    return f"{task} {of(metric).short}".rstrip()
