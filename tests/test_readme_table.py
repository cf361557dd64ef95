"""The README's kernel table says what benchmarks/results says, and nothing else."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("readme_table", ROOT / "tools" / "readme_table.py")
readme_table = importlib.util.module_from_spec(spec)
spec.loader.exec_module(readme_table)


def document(device="cuda", **sections) -> dict:
    versions = {"torch": "2.11.0", "triton": "3.6.0"}
    machine = {"device": device, "name": "NVIDIA X", "date": "2026-11-21T00:00:00+00:00"}
    return {"machine": machine | {"versions": versions}, "sections": sections}


def row(name, seconds=None, speedup=None, ok=True) -> dict:
    found = {"site": "down", "shape": "64x32", "tokens": 16, "name": name, "check": {"ok": ok}}
    if seconds:
        found |= {"seconds": seconds, "speedup": speedup, "against": "dense bfloat16"}
    return found


def test_the_readme_is_what_the_files_say():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text == readme_table.wanted(text), "run: make readme-table"


def test_without_a_gpu_file_it_says_that_no_number_exists(tmp_path):
    assert readme_table.markdown([]).startswith("No GPU number exists yet")
    (tmp_path / "trial.json").write_text(json.dumps(document("cpu")))
    assert readme_table.results(tmp_path) == []


def test_a_cpu_is_shown_beside_the_missing_gpu(tmp_path):
    rows = [row("dense bfloat16", 2e-5, 1.0), row("W4A8", 1e-5, 2.0)]
    found = {"bench": "layers", "rows": rows, **document("cpu")}
    found["machine"] |= {"threads": 2, "kernels": "C, avx2"}
    del found["sections"]
    (tmp_path / "cpu.json").write_text(json.dumps(found))
    table = readme_table.markdown(readme_table.results(tmp_path))
    assert "2 threads, C, avx2" in table
    assert "| down 64x32 | 16 | 20.0 us bfloat16 | 2.00x |" in table
    assert table.endswith(readme_table.NONE)


def test_speed_slowness_and_wrongness_are_all_shown(tmp_path):
    rows = [
        row("dense bfloat16", 2e-5, 1.0), row("W4A8", 1e-5, 2.0), row("W8A8", 4e-5, 0.5),
        row("W4A8 rank 0.05, vision 100%", ok=False),
    ]  # fmt: skip
    found = document(layers={"status": "failed", "rows": rows}, model={"status": "ok", "rows": []})
    (tmp_path / "x.json").write_text(json.dumps(found))
    table = readme_table.markdown(readme_table.results(tmp_path))
    assert "| down 64x32 | 16 | 20.0 us bfloat16 | 2.00x | 0.50x (slower) | wrong |" in table
    assert "NVIDIA X" in table and "torch 2.11.0" in table
    assert "Not in order in this run: layers." in table
    assert "No GPU number" not in table


def test_only_what_is_between_the_markers_changes():
    text = f"a\n{readme_table.BEGIN}\nold\n{readme_table.END}\nb\n"
    assert readme_table.rewritten(text, "new") == text.replace("old", "new")
    with pytest.raises(ValueError, match="lacks"):
        readme_table.rewritten("no markers", "new")
    begin, end = readme_table.QUALITY
    both = f"{text}{begin}\nkept\n{end}\n"
    assert readme_table.rewritten(both, "new", readme_table.QUALITY) == both.replace("kept", "new")
    assert readme_table.rewritten(both, None, readme_table.QUALITY) == both


def evidence(folder, bits, method, values, sqnr, **more) -> None:
    tasks = {name: {"value": v, "ci": [v - 1, v + 1], "n": 9} for name, v in values.items()}
    row = {"tasks": tasks, "sqnr_db": dict(zip(("text", "vision", "audio"), sqnr, strict=True))}
    path = folder / "evidence" / "planted" / bits.lower() / f"{method}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"row": row | {"bytes": 1_690_000}, **more}))


def test_quality_tables_say_what_evidence_measured(tmp_path):
    whole = {"tasks": {"sum": {"value": 98.0}, "speech": {"value": 99.55}}, "sqnr_db": None}
    for b, bits in enumerate(("W4A8", "W4A6")):
        for m, method in enumerate(readme_table.METHODS):
            said = {"float": whole | {"bytes": 6_290_000}} if method == "rtn" else {}
            values = {"sum": 90.0 + m, "speech": 80.26 + b}
            evidence(tmp_path, bits, method, values, (m + 0.04, 10 + m, 20.0 - b), **said)
    assert readme_table.quality(tmp_path / "evidence").splitlines() == [
        "|  | bits | speech | sum | text dB | vision dB | audio dB | linears |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| float |  | 99.5 % | 98.0 % |  |  |  | 6.29 MB |",
        "| round to nearest | W4A8 | 80.3 % | 90.0 % | 0.0 | 10.0 | 20.0 | 1.69 MB |",
        "| SmoothQuant | W4A8 | 80.3 % | 91.0 % | 1.0 | 11.0 | 20.0 | 1.69 MB |",
        "| masquant, as published | W4A8 | 80.3 % | 92.0 % | 2.0 | 12.0 | 20.0 | 1.69 MB |",
        "| **masquant-joint** | W4A8 | 80.3 % | 93.0 % | 3.0 | 13.0 | 20.0 | 1.69 MB |",
        "| round to nearest | W4A6 | 81.3 % | 90.0 % | 0.0 | 10.0 | 19.0 | 1.69 MB |",
        "| SmoothQuant | W4A6 | 81.3 % | 91.0 % | 1.0 | 11.0 | 19.0 | 1.69 MB |",
        "| masquant, as published | W4A6 | 81.3 % | 92.0 % | 2.0 | 12.0 | 19.0 | 1.69 MB |",
        "| **masquant-joint** | W4A6 | 81.3 % | 93.0 % | 3.0 | 13.0 | 19.0 | 1.69 MB |",
    ]
    assert readme_table.choice(tmp_path / "evidence") is None  # W8A8 is not measured
    assert readme_table.choice(tmp_path / "evidence", ("W4A8", "W4A6")).splitlines() == [
        "| SQNR in dB: text / vision / audio | W4A8 | W4A6 |",
        "| --- | --- | --- |",
        "| `masquant`, the paper's choice | 2.0 / 12.0 / 20.0 | 2.0 / 12.0 / 19.0 |",
        "| `masquant-joint` | 3.0 / 13.0 / 20.0 | 3.0 / 13.0 / 19.0 |",
    ]
    (tmp_path / "evidence/planted/w4a6/rtn.json").unlink()
    assert readme_table.quality(tmp_path / "evidence") is None
