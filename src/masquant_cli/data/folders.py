"""`imagefolder:DIR` and `audiofolder:DIR`: one row per file, read in place.

The layout is the one Hugging Face documents: DIR/SPLIT/LABEL/FILE, where splits and labels are
optional, or a metadata.csv, .jsonl or .parquet with a `file_name` column. Their own loader
copies every file through a cache and needs torchcodec even to list audio.
"""

import json
from pathlib import Path

from masquant_cli.errors import RecipeError

SUFFIXES = {
    "image": {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"},
    "audio": {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au"},
}
SPLITS = {"train", "test", "validation", "valid", "val", "dev", "eval"}


def read_folder(folder: Path, kind: str, split: str, where: str) -> dict[str, list]:
    """Columns `kind` ("image" or "audio": paths) and, where the layout gives them, `label` or
    those of the metadata file. Rows are sorted by path. Raises RecipeError."""
    splits = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name in SPLITS)
    if splits:
        if split not in splits:
            raise RecipeError(
                f"there is no split {split!r}", where=where, hint=f"the splits are {splits}"
            )
        folder = folder / split
    elif split != "train":
        raise RecipeError(
            f"there is no split {split!r}",
            where=where,
            hint="without subfolders named after splits there is one, 'train'; leave `split` out",
        )
    for metadata in (folder / f"metadata.{suffix}" for suffix in ("csv", "jsonl", "parquet")):
        if metadata.is_file():
            return _with_metadata(metadata, kind, where)
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES[kind])
    if not files:
        raise RecipeError(
            f"the folder holds no {kind} files",
            where=where,
            hint=f"{', '.join(sorted(SUFFIXES[kind]))} are read; unpack archives first",
        )
    columns = {kind: [str(p) for p in files]}
    if all(p.parent != folder for p in files):
        columns["label"] = [p.parent.name for p in files]
    return columns


def _with_metadata(path: Path, kind: str, where: str) -> dict[str, list]:
    try:
        rows = _read(path)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path.name} cannot be read ({error})", where=where) from error
    names = list(dict.fromkeys(name for row in rows for name in row))
    if "file_name" not in names:
        raise RecipeError(
            f"{path.name} has no `file_name` column",
            where=where,
            hint=f"its columns are {', '.join(names) or '(none)'}",
        )
    columns = {name: [row.get(name) for row in rows] for name in names if name != "file_name"}
    return {kind: [str(path.parent / row["file_name"]) for row in rows], **columns}


def _read(path: Path) -> list[dict]:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    if path.suffix == ".csv":
        from pyarrow import csv

        return csv.read_csv(path).to_pylist()
    from pyarrow import parquet

    return parquet.read_table(path).to_pylist()
