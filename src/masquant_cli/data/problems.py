"""What `datasets` and the hub raise, as one clear error of ours each."""

import contextlib
import re

from masquant_cli.errors import EnvironmentProblem, MasquantError, RecipeError
from masquant_cli.recipe import Source


@contextlib.contextmanager
def translated(source: Source, where: str):
    """Turn what `datasets` raises into one of our errors."""
    try:
        yield
    except MasquantError:
        raise
    except ImportError as error:
        raise EnvironmentProblem(
            f"reading this data set needs a package that is missing ({error})",
            where=where,
        ) from error
    except MemoryError:
        raise
    except Exception as error:
        raise _explain(error, source, where) from error


def _explain(error: Exception, source: Source, where: str) -> MasquantError:
    chain, cause = [], error
    while cause is not None and len(chain) < 8:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    kinds = {kind.__name__ for item in chain for kind in type(item).__mro__}
    text = str(error)
    split = re.search(r"(?:Unknown|Bad) split:? \"?(.+?)\"?\.? .*?(\[.*\])", text)
    if split:
        return RecipeError(
            f"there is no split {source.split!r}", where=where, hint=f"the splits are {split[2]}"
        )
    if "BuilderConfig" in text or "Config name is missing" in text:
        names = re.search(r"(\[.*\])", text, re.DOTALL)
        hint = f"set `subset` to one of {names[1]}" if names else "set or remove `subset`"
        return RecipeError(f"there is no subset {source.subset!r}", where=where, hint=hint)
    if kinds & {"ConnectionError", "OfflineModeIsEnabled", "ConnectError", "TimeoutException"}:
        return EnvironmentProblem(
            "the Hugging Face hub cannot be reached and the data set is not in the cache",
            where=where,
            hint="download it on a machine with network (`hf download --repo-type dataset ID "
            "--local-dir DIR`) and name the folder; HF_HUB_OFFLINE=1 skips the attempts",
        )
    if kinds & {"DatasetNotFoundError", "RepositoryNotFoundError", "GatedRepoError"}:
        return RecipeError(
            "the data set does not exist on the hub, or it needs a login",
            where=where,
            hint="check the id; for a gated data set accept its terms and run `hf auth login`",
        )
    if any(isinstance(item, OSError) and item.errno == 28 for item in chain):
        return EnvironmentProblem(
            "the disk is full", where=where, hint="free space, or move HF_HOME to another disk"
        )
    if "EmptyDatasetError" in kinds or "DataFilesNotFoundError" in kinds:
        return RecipeError(
            "the folder holds no data files", where=where, hint="parquet, json, jsonl or csv"
        )
    root = chain[-1]
    if isinstance(root, StopIteration) or "corresponds to no data" in str(root):
        return RecipeError(f"split {source.split!r} has no rows", where=where)
    detail = " ".join(str(root).split())[:300] or type(root).__name__
    return RecipeError(
        f"the data cannot be read ({type(root).__name__}: {detail})",
        where=where,
        hint="every file of a split must have the same columns; check one of them by itself",
    )
