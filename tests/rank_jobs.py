"""What the processes of test_distributed.py do. Importable, since they are started afresh."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

from masquant_cli import distributed, ranks
from masquant_cli.errors import ArtifactError


def exchange(out: str) -> int:
    """Everything a World offers; each rank writes down what it got."""
    world = distributed.join()
    r = world.rank
    got = {"main": world.from_main(lambda: ["of rank", r]), "all": world.all_gather({"r": r})}
    seen = []
    for owner in range(world.size):
        mine = {
            "rows": torch.full((r * 2, 3), float(r)),  # none on rank 0
            "keys": torch.arange(r * 2, dtype=torch.float64) + r,
            "count": torch.tensor([10**12 + r]),
            "half": torch.tensor([[1.5], [r]], dtype=torch.bfloat16),
            "turned": torch.arange(6.0).view(2, 3).T + r,  # not contiguous
        }
        seen.append(
            [{k: [str(t.dtype), t.tolist()] for k, t in x.items()}
             for x in world.collect(owner, mine)]
        )  # fmt: skip
    got["collected"] = seen
    world.barrier()
    world.check_shared(Path(out))
    got["threads"] = torch.get_num_threads()
    Path(out, f"{r}.json").write_text(json.dumps(got))
    world.leave()
    return 0


def command(*argv: str) -> int:
    """masquant itself, in its place among the ranks."""
    from masquant_cli.cli.app import main

    return main(list(argv))


def failing(how: str, busy: float, *argv: str) -> int:
    """A command of which rank 1 fails, while rank 0 waits for it or first works `busy` seconds."""
    from masquant_cli import pipeline
    from masquant_cli.cli.app import main

    def run(recipe, run_dir, **_):
        world = distributed.world()
        world.pulse()
        if world.rank == 1:
            _end(how)
        time.sleep(busy)
        world.barrier()
        return {}

    pipeline.run = run
    return main(list(argv))


def downloading(seconds: float) -> int:
    """Rank 0 does something for long of which only `busy` tells."""
    world = distributed.join()

    def fetch() -> str:
        with world.busy():
            time.sleep(seconds)
        return "there"

    found = world.from_main(fetch)
    world.leave()
    return 0 if found == "there" else 1


def _end(how: str) -> None:
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "hung":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "bug":
        raise AssertionError("an odd number")
    if how == "terminated":
        os.kill(os.getpid(), signal.SIGTERM)
    raise ArtifactError("layer 3 is damaged", where="layers/003.safetensors", hint="delete it")


def sending_to_the_dead(out: str) -> int:
    """Rank 1 dies between its offer and the tensors."""
    world = distributed.join()
    if world.rank:
        import torch.distributed as dist

        dist.send = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    try:
        list(world.collect(0, {"x": torch.zeros(3)}))
    except Exception as error:
        print(type(error).__name__, error, error.where, error.hint, sep="\n", file=sys.stderr)
        return 5
    return 0


def blind(here: str, there: str) -> int:
    world = distributed.join()
    ranks.SHOWN_AFTER = 0.2
    try:
        world.check_shared(Path(here if world.rank == 0 else there))
    except Exception as error:
        print(error, error.where, sep="\n", file=sys.stderr)
        return error.exit_code
    return 0


QUICK = (
    *(f"calibration.sources.{i}.limit=4" for i in range(4)),
    "calibration.batch_tokens=512",
    "smoothing.learn=false",
    "weights.rounding=nearest",
    "export.verify=false",
)


def whole_runs(*folders: str) -> int:
    """The same recipe in each of some folders."""
    from jobs import small

    from masquant_cli import pipeline

    world = distributed.join() if distributed.launched() else distributed.world()
    for folder in folders:
        pipeline.run(small(*QUICK), Path(folder))
    world.leave()
    return 0


def choosing(out: str) -> int:
    """Choose samples by quotas that are full at different times, one of whose sources breaks."""
    from jobs import small

    from masquant_cli.progress import NullProgress
    from masquant_cli.stages import samples
    from masquant_cli.stages.job import Job

    world = distributed.join() if distributed.launched() else distributed.world()
    tokens = {"text": 150, "vision": 12, "audio": 500}
    job = Job(small(*(f"calibration.tokens.{m}={n}" for m, n in tokens.items())), NullProgress())
    load, read = samples.load_samples, []

    def breaking(source, **options):
        for count, sample in enumerate(load(source, **options)):
            if count == 5 and samples._fills(source, job.recipe.modalities) == ["vision"]:
                raise ArtifactError("nobody may come so far")
            read.append(sample.key)
            yield sample

    samples.load_samples = breaking
    chosen = samples.choose_samples(job.recipe, job.float, NullProgress(), world)
    found = [[s.key for s in chosen.samples], chosen.lengths, chosen.tokens, len(read)]
    Path(out, f"{world.rank}.json").write_text(json.dumps(found))
    world.leave()
    return 0


def blocks_alone() -> int:
    """Rank 0 alone prepares decoder layers, as the objective block has it, while others wait."""
    from jobs import small

    from masquant_cli.progress import NullProgress
    from masquant_cli.stages.blocks import Blocks
    from masquant_cli.stages.job import Job

    world = distributed.join()
    job = Job(small("smoothing.samples=3"), NullProgress(), world=world)
    if world.main:
        blocks = Blocks(job, Path())
        blocks.prepare()
        blocks.close()
    world.barrier()
    world.leave()
    return 0


def dying_run(run_dir: str, layer: int) -> int:
    """`masquant run` whose rank 1 is killed when calibrate comes to a layer."""
    from jobs import SMALL

    from masquant_cli.cli.app import main
    from masquant_cli.stages import calibrate

    advance = calibrate._advance

    def dying(job, at, *rest):
        if distributed.world().rank == 1 and at.layer == layer:
            os.kill(os.getpid(), signal.SIGKILL)
        return advance(job, at, *rest)

    calibrate._advance = dying
    changes = [word for change in (*SMALL, *QUICK) for word in ("--set", change)]
    return main(["run", "-c", "tiny-omni-w4a8", "--run-dir", run_dir, *changes])
