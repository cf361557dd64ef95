"""How large every modality is at every site of the language model, on the calibration sets.

    python tools/tiny_omni/ranges.py [FOLDER] [--json FILE]

Ratio means: absmax of a channel on vision tokens over its absmax on text and audio tokens.
"""

import argparse
import json
from pathlib import Path

import pyarrow.parquet as pq
import torch
from evaluate import load, messages
from model import build_model
from plant import Plant, Planted
from spec import ASSETS, HIDDEN

MODALITIES = ("text", "vision", "audio")
SITES = {
    "attn_in": "self_attn.q_proj",
    "attn_out": "self_attn.o_proj",
    "mlp_in": "mlp.gate_proj",
    "mlp_out": "mlp.down_proj",
}
FLOOR = 1e-3  # of the ratio's denominator, relative to the median channel
SHARES = (0.01, 0.5, 0.99)


@torch.no_grad()
def absmax(processor, model) -> dict:
    """{(layer, site): [3, channels]} over all calibration rows, answers included."""
    found, current, handles = {}, {}, []
    text = model.model.language_model

    def note_modality(_, args, kwargs):
        ids = kwargs["input_ids"]
        modality = torch.zeros_like(ids)
        modality[ids == model.config.image_token_id] = 1
        modality[ids == model.config.audio_token_id] = 2
        modality[kwargs["attention_mask"] == 0] = -1
        current["modality"] = modality

    def watch(key):
        def hook(_, args):
            best = found.setdefault(key, torch.zeros(3, args[0].shape[-1]))
            for code in range(3):
                rows = args[0][current["modality"] == code]
                if len(rows):
                    best[code] = torch.maximum(best[code], rows.abs().amax(0))

        return hook

    handles.append(model.model.register_forward_pre_hook(note_modality, with_kwargs=True))
    for number, layer in enumerate(text.layers):
        for site, name in SITES.items():
            hook = watch((number, site))
            handles.append(layer.get_submodule(name).register_forward_pre_hook(hook))
    for path in sorted((ASSETS / "data").glob("calibration-*.parquet")):
        rows = pq.read_table(path).to_pylist()
        for first in range(0, len(rows), 64):
            chats = [
                [
                    *messages(row),
                    {"role": "assistant", "content": [{"type": "text", "text": row["answer"]}]},
                ]
                for row in rows[first : first + 64]
            ]
            model(
                **processor.apply_chat_template(
                    chats,
                    tokenize=True,
                    return_dict=True,
                    return_tensors="pt",
                    processor_kwargs=dict(padding=True),
                )
            )
    for handle in handles:
        handle.remove()
    return found


def planted_channels(tokenizer) -> tuple:
    """(residual channels of vision, of audio, intermediate channels per layer), from the seed."""
    anything = torch.randn(8, HIDDEN, generator=torch.Generator().manual_seed(0)).half()
    planted = Planted(build_model(tokenizer, 0), Plant(), [anything.clone()], [anything.clone()])
    return planted.vision, planted.audio, planted.neurons


def table(ranges: dict, planted: tuple) -> list:
    vision, audio, neurons = planted
    rows = []
    for (layer, site), best in ranges.items():
        own = {"mlp_out": neurons[layer], "attn_out": vision[:0]}.get(site, vision)
        ordinary = torch.ones(best.shape[1], dtype=torch.bool)
        ordinary[own] = False
        if site in ("attn_in", "mlp_in"):
            ordinary[audio] = False
        others = torch.maximum(best[0], best[2])
        ratio = best[1] / others.clamp(min=FLOOR * float(others.median()))
        row = {"layer": layer, "site": site}
        for code, name in enumerate(MODALITIES):
            row[f"{name}_median"] = round(float(best[code].median()), 2)
            row[f"{name}_ordinary_max"] = round(float(best[code][ordinary].max()), 2)
        for share, value in zip(
            SHARES, torch.quantile(ratio[ordinary], torch.tensor(SHARES)).tolist(), strict=True
        ):
            row[f"ratio_{share}"] = round(value, 2)
        if len(own):
            row["planted_vision"] = round(float(best[1][own].mean()), 1)
            row["planted_others"] = round(float(others[own].mean()), 4)
            row["planted_ratio"] = round(float(ratio[own].median()), 1)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ASSETS / "model")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    processor, model = load(args.folder)
    rows = table(absmax(processor, model), planted_channels(processor.tokenizer))
    names = list(rows[0])
    names += [name for row in rows for name in row if name not in names]
    names = list(dict.fromkeys(names))
    print("| " + " | ".join(name.replace("_", " ") for name in names) + " |")
    print("|" + "---|" * len(names))
    for row in rows:
        print("| " + " | ".join(str(row.get(name, "")) for name in names) + " |")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
