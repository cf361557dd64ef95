"""Train tiny-omni on a CPU, stage by stage; every stage checkpoints and resumes.

    for stage in vision audio pools language export; do
        python tools/tiny_omni/train.py $stage
    done

`twin` trains the same language model without planted outliers, for comparison. Intermediate files
go to --work; `export` writes the packaged model. docs/tiny-omni.md has the seconds and the figures.
"""

import argparse
from pathlib import Path

import torch
from export import export
from language import train_language
from model import build_model, build_processor
from plant import Plant
from pool import build_pools
from spec import ASSETS
from towers import train_audio, train_vision

SEED = 0
STAGES = ("vision", "audio", "pools", "language", "twin", "export")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--work", type=Path, default=Path("/tmp/tiny-omni"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--folder", type=Path, default=ASSETS / "model", help="of export")
    parser.add_argument("--checkpoint", default="language.pt", help="of export, in --work")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    processor = build_processor()
    tokenizer, extractor = processor.tokenizer, processor.feature_extractor
    model = build_model(tokenizer, SEED)
    if args.stage == "vision":
        train_vision(model.model.visual, args.work / "vision.pt", args.steps or 2400)
    elif args.stage == "audio":
        train_audio(model.model.audio_tower, extractor, args.work / "audio.pt", args.steps or 1000)
    elif args.stage == "pools":
        model.model.visual.load_state_dict(torch.load(args.work / "vision.pt")["tower"])
        model.model.audio_tower.load_state_dict(torch.load(args.work / "audio.pt")["tower"])
        build_pools(model, extractor, args.work / "pools.pt")
    elif args.stage == "export":
        export(args.work / args.checkpoint, args.folder)
    else:
        plant = Plant() if args.stage == "language" else None
        train_language(
            tokenizer,
            args.work / "pools.pt",
            args.work / f"{args.stage}.pt",
            args.steps or 700,
            plant,
            noise=0.02,
        )


if __name__ == "__main__":
    main()
