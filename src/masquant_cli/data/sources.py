"""Rows of a recipe's Source, in seeded order, with media left undecoded.

Every way of opening a data set ends in one clear error. Class labels become their names.
Nothing is written outside the Hugging Face cache, and a cache that cannot be written is
replaced by a temporary one.
"""

import atexit
import contextlib
import difflib
import functools
import importlib.resources
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from masquant_cli.data.folders import read_folder
from masquant_cli.data.problems import translated
from masquant_cli.data.text import missing_column
from masquant_cli.errors import RecipeError
from masquant_cli.recipe import Source

BUILTIN = "builtin:tiny-omni/"
FOLDERS = {"imagefolder:": "image", "audiofolder:": "audio"}
FORMATS = {"parquet": "parquet", "json": "json", "jsonl": "json", "csv": "csv"}
STREAM_BUFFER = 1024  # rows held while shuffling a stream
IN_MEMORY = 256 * 2**20  # a parquet file up to this many bytes is read without any cache


@functools.lru_cache(maxsize=1)
def _scratch() -> str:
    path = tempfile.mkdtemp(prefix="masquant-datasets-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def where_of(source: Source) -> str:
    """How errors name the source."""
    subset = f"/{source.subset}" if source.subset else ""
    return f"dataset {source.dataset}{subset}"


def base_folder(source: Source) -> str | None:
    """The folder that relative media paths start from, None for a hub data set."""
    path = _local_path(source)
    if path is None:
        return None
    return str(path if path.is_dir() else path.parent)


def iterate(source: Source, *, seed: int, columns: Iterable[str]) -> Iterator[tuple[int, dict]]:
    """Yield (row index, row) after `where`, shuffling and `limit`.

    `columns` are the names that the caller is going to read; a missing one is refused before
    the first row. The row index counts the rows of the split (in a stream: the rows read).
    Raises RecipeError or EnvironmentProblem.
    """
    where = where_of(source)
    dataset = _open(source)
    names = dataset.column_names
    if names is not None:
        for column in [*columns, *source.where]:
            if column not in names:
                raise missing_column(column, names, where)
    rows = _map_rows if hasattr(dataset, "select") else _stream_rows
    count = 0
    with translated(source, where_of(source)):
        for index, row in rows(dataset, source, seed):
            yield index, row
            count += 1
            if count == source.limit:
                return
    if count == 0:
        if source.where:
            raise RecipeError(
                f"no row of split {source.split!r} matches {dict(source.where)}",
                where=where,
                hint=_seen_values(dataset, source),
            )
        raise RecipeError(f"split {source.split!r} has no rows", where=where)


def count_rows(source: Source) -> int | None:
    """How many rows `iterate` yields; None of a stream, which does not know."""
    dataset = _open(source)
    if not hasattr(dataset, "select"):
        return None
    found = len(_matching(dataset, source))
    return min(found, source.limit) if source.limit else found


def _matching(dataset, source: Source) -> np.ndarray:
    """Indices of the rows that `where` keeps."""
    if not source.where:
        return np.arange(len(dataset))
    tests = dataset.select_columns(list(source.where))
    labels = _labels(tests)
    kept = [i for i, row in enumerate(tests) if _matches(row, labels, source)]
    return np.array(kept, dtype=np.int64)


def _map_rows(dataset, source: Source, seed: int) -> Iterator[tuple[int, dict]]:
    indices = _matching(dataset, source)
    if source.shuffle:
        indices = np.random.default_rng(seed).permutation(indices)
    labels = _labels(dataset)
    for index in indices.tolist():
        yield index, _named(dataset[index], labels)


def _stream_rows(dataset, source: Source, seed: int) -> Iterator[tuple[int, dict]]:
    labels = _labels(dataset)
    if source.shuffle:
        dataset = dataset.shuffle(seed=seed, buffer_size=STREAM_BUFFER)
    for index, row in enumerate(dataset):
        if _matches(row, labels, source):
            yield index, _named(row, labels)


def _labels(dataset) -> dict[str, list[str]]:
    """Class names of the ClassLabel columns."""
    features = dataset.features or {}
    return {k: f.names for k, f in features.items() if type(f).__name__ == "ClassLabel"}


def _named(row: dict, labels: dict[str, list[str]]) -> dict:
    if not labels:
        return row
    row = dict(row)
    for column, names in labels.items():
        if isinstance(row[column], int):  # -1 is "no label" in test splits
            row[column] = names[row[column]] if row[column] >= 0 else None
    return row


def _matches(row: dict, labels: dict[str, list[str]], source: Source) -> bool:
    named = _named(row, labels)
    for column, wanted in source.where.items():
        if column not in row:
            raise missing_column(column, row, where_of(source))
        if wanted != row[column] and wanted != named[column]:
            return False
    return True


def _seen_values(dataset, source: Source) -> str | None:
    if not hasattr(dataset, "select"):
        return None
    head = dataset.select_columns(list(source.where)).select(range(min(len(dataset), 1000)))
    labels, parts = _labels(head), []
    rows = [_named(row, labels) for row in head]
    for column in source.where:
        values = list(dict.fromkeys(repr(row[column]) for row in rows))[:5]
        parts.append(f"{column} holds {', '.join(values) or 'nothing'}")
    return "; ".join(parts)


def _local_path(source: Source) -> Path | None:
    """The file or folder behind a source, None for a hub id. Refuses what does not exist."""
    name = source.dataset
    if name.startswith(BUILTIN):
        return _builtin(name, where_of(source))
    for prefix in FOLDERS:
        if name.startswith(prefix):
            path = Path(name.removeprefix(prefix)).expanduser()
            if not path.is_dir():
                raise RecipeError(f"the folder {path} does not exist", where=where_of(source))
            return path
    path = Path(name).expanduser()
    if path.exists():
        if path.is_file() and path.suffix.lstrip(".").lower() not in FORMATS:
            raise RecipeError(
                f"{path.name} is not a data file that can be read",
                where=where_of(source),
                hint="use a parquet, json, jsonl or csv file",
            )
        return path
    looks_local = path.suffix.lstrip(".").lower() in FORMATS or name.startswith(("/", ".", "~"))
    if looks_local or name.count("/") > 1:
        raise RecipeError(
            f"the file or folder {path} does not exist",
            where=where_of(source),
            hint=f"relative paths start in the working directory, {os.getcwd()}",
        )
    return None


def local_files(source: Source) -> list[Path]:
    """The files behind a local source, sorted; none for a hub id, which counts by its name."""
    path = _local_path(source)
    if path is None or path.is_file():
        return [] if path is None else [path]
    return sorted(p for p in path.rglob("*") if p.is_file())


def _builtin(name: str, where: str) -> Path:
    folder = Path(str(importlib.resources.files("masquant_cli"))) / "assets/tiny-omni/data"
    path = folder / f"{name.removeprefix(BUILTIN)}.parquet"
    if path.is_file() and path.parent == folder:
        return path
    there = sorted(p.stem for p in folder.glob("*.parquet"))
    near = difflib.get_close_matches(name.removeprefix(BUILTIN), there, n=1)
    hint = f"did you mean {BUILTIN}{near[0]}? " if near else ""
    raise RecipeError(
        "no such built-in data set", where=where, hint=f"{hint}there are: {', '.join(there)}"
    )


def _open(source: Source):
    """The split as a datasets.Dataset or IterableDataset with media columns undecoded."""
    where = where_of(source)
    path = _local_path(source)  # before the import, which takes a second
    with translated(source, where_of(source)), _quiet():
        import datasets

        kwargs: dict[str, Any] = {"split": source.split, "streaming": source.streaming}
        if path is None:
            name = source.dataset
            kwargs |= {"name": source.subset, "revision": source.revision}
        elif source.dataset.startswith(tuple(FOLDERS)):
            kind = FOLDERS[source.dataset.split(":")[0] + ":"]
            return datasets.Dataset.from_dict(read_folder(path, kind, source.split, where))
        elif path.is_dir():
            name = str(path)
            kwargs |= {"name": source.subset}
        else:
            base = source.split.split("[")[0]
            if base != "train":
                raise RecipeError(
                    f"there is no split {base!r}",
                    where=where,
                    hint="a single file has one split, 'train'; leave `split` out",
                )
            name = FORMATS[path.suffix.lstrip(".").lower()]
            whole = name == "parquet" and source.split == "train" and not source.streaming
            if whole and path.stat().st_size <= IN_MEMORY:
                import pyarrow.parquet

                return _undecoded(datasets.Dataset(pyarrow.parquet.read_table(path)))
            kwargs |= {"data_files": str(path)}
        return _undecoded(_load(datasets, name, kwargs))


def _load(datasets, name: str, kwargs: dict):
    cache = datasets.config.HF_DATASETS_CACHE
    if _writable(cache):  # streams make the folder too
        return datasets.load_dataset(name, **kwargs)
    return datasets.load_dataset(name, cache_dir=_scratch(), **kwargs)


def _writable(folder: str | os.PathLike) -> bool:
    folder = Path(folder)
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    # os.access answers from the mode bits, which root ignores and a read-only mount does not
    # show: try.
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _undecoded(dataset):
    """Ask for bytes and paths: decoding here would need torchcodec, and a bad file has no row."""
    import datasets

    if isinstance(dataset, datasets.IterableDataset):
        # Without declared features (csv, json) there is nothing that would be decoded.
        return dataset.decode(False) if dataset.features else dataset
    for column, feature in dataset.features.items():
        raw = _raw(feature, datasets)
        if raw != feature:
            dataset = dataset.cast_column(column, raw)
    return dataset


def _raw(feature, datasets):
    if isinstance(feature, datasets.Image | datasets.Audio):
        return type(feature)(decode=False)
    if type(feature).__name__ == "List":
        return datasets.List(_raw(feature.feature, datasets))
    return feature


@contextlib.contextmanager
def _quiet():
    """No progress bars and no chatter while a data set is opened; the settings come back after."""
    import datasets

    bars = datasets.are_progress_bars_disabled()
    level = datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()
