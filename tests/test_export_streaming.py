"""Exports written and verified piece by piece: the file writer, layouts on disk, refusals."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from masquant_cli.shard_writer import Entry, new_shard


def odd_tensors() -> dict[str, torch.Tensor]:
    """Every dtype with odd sizes, so that a wrong order would leave tensors out of line."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(*shape, generator=generator) * 50

    return {
        "z.packed": noise(3, 5).to(torch.int8),
        "a.scale": noise(3, 1),
        "m.low": noise(2, 1, 7).half(),
        "b.brain": noise(5).bfloat16(),
        "c.steps": torch.tensor(7),
        "d.bytes": noise(3).abs().to(torch.uint8),
        "e.flag": torch.tensor([True, False, True]),
        "é.empty": torch.empty(0, 4),
        "f.double": noise(1, 1).double(),
        "g.short": noise(3).to(torch.int16),
        "h.int": noise(1).to(torch.int32),
    }


def entries(tensors) -> dict[str, Entry]:
    return {name: Entry(t.dtype, tuple(t.shape)) for name, t in tensors.items()}


def test_the_writer_gives_the_librarys_own_bytes_in_whatever_order_tensors_come(tmp_path):
    tensors = odd_tensors()
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    for order in (list(tensors), sorted(tensors), sorted(tensors, reverse=True)):
        with new_shard(tmp_path / "ours.safetensors", entries(tensors)) as shard:
            for name in order:
                shard.write(name, tensors[name])
        theirs, ours = (tmp_path / f"{who}.safetensors" for who in ("theirs", "ours"))
        assert ours.read_bytes() == theirs.read_bytes()
    found = load_file(ours)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    with safe_open(ours, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_writer_copies_bytes_and_writes_views(tmp_path):
    x = torch.arange(30, dtype=torch.float32).reshape(5, 6)
    raw = bytes(x.numpy())
    file = tmp_path / "x.safetensors"
    with new_shard(file, {"x": Entry(x.dtype, (5, 6)), "t": Entry(x.dtype, (6, 5))}) as shard:
        shard.write("t", x.T)
        shard.copy("x", [raw[:7], raw[7:64], memoryview(raw)[64:]])
    found = load_file(file)
    assert torch.equal(found["x"], x) and torch.equal(found["t"], x.T)


@pytest.mark.parametrize(
    "fill",
    [
        lambda s: s.write("x", torch.zeros(2, 3)),
        lambda s: (s.write("x", torch.zeros(2, 3)), s.write("x", torch.zeros(2, 3))),
        lambda s: s.write("x", torch.zeros(3, 2)),
        lambda s: s.write("x", torch.zeros(2, 3).bfloat16()),
        lambda s: s.write("other", torch.zeros(2, 3)),
        lambda s: s.copy("x", [bytes(23)]),
        lambda s: s.copy("x", [bytes(20), bytes(5)]),
        lambda s: None,
    ],
    ids=["one-missing", "twice", "shape", "dtype", "unknown", "short", "long", "nothing"],
)
def test_the_writer_refuses_what_its_header_does_not_say_and_leaves_nothing(tmp_path, fill):
    announced = {"x": Entry(torch.float32, (2, 3)), "y": Entry(torch.int8, (4,))}
    with pytest.raises(ValueError), new_shard(tmp_path / "file.safetensors", announced) as shard:
        fill(shard)
    assert list(tmp_path.iterdir()) == []
