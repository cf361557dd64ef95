"""Everything a user can do wrong ends here: what happened, where, and what to do next.

Only a bug may show a traceback. Exit codes are part of the command line's contract.
"""

EXIT_OK = 0
EXIT_CHECK = 1  # a check was not met (verification, --fail-under)
EXIT_USAGE = 2  # usage, recipe, data or model the recipe names
EXIT_ENVIRONMENT = 3  # missing package, unreachable hub, full disk, memory
EXIT_ARTIFACT = 4  # stale, locked or corrupt artifact
EXIT_BUG = 70
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143  # SIGTERM, which schedulers send


class MasquantError(Exception):
    """One clear error. `where` is `file:line:column`, a path, or a site name."""

    exit_code = EXIT_USAGE

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None):
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint


class RecipeError(MasquantError):
    """The recipe, or the data or model it names, cannot be used."""


class CheckError(MasquantError):
    """The work was done and a check on it was not met."""

    exit_code = EXIT_CHECK


class EnvironmentProblem(MasquantError):
    """The machine lacks something: a package, the network, disk or memory."""

    exit_code = EXIT_ENVIRONMENT


class ArtifactError(MasquantError):
    """A file masquant wrote earlier is stale, locked, truncated or not its own."""

    exit_code = EXIT_ARTIFACT
