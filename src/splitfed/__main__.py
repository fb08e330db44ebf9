"""`python -m splitfed`, for where the command `splitfed` isn't on the path."""

from __future__ import annotations

import sys

from splitfed.cli.command import main

if __name__ == "__main__":
    sys.exit(main())
