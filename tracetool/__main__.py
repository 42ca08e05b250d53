"""Entry point: every error becomes one line on stderr and an exit code; no traceback reaches a user."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

__all__ = ["main"]


def main() -> NoReturn:
    """Run the command line (`tracetool …`)."""
    from tracetool.cli import run

    sys.exit(run(sys.argv[1:], debug=bool(os.environ.get("TRACETOOL_DEBUG"))))


if __name__ == "__main__":
    main()
