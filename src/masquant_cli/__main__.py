"""`python -m masquant_cli` is `masquant`."""

import sys

from masquant_cli.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
