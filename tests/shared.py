"""Where the bigger recordings live, when they are there at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

__all__ = ["SAMPLES", "shared_path"]

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT / "samples"


def shared_path(name: str) -> Path:
    """Path below the folder of bigger recordings (`../shared` or $TRACETOOL_SHARED); skips the test if absent."""
    path = Path(os.environ.get("TRACETOOL_SHARED", ROOT.parent / "shared")) / name
    if not path.exists():
        pytest.skip(f"needs {name}, which is not part of the repository")
    return path
