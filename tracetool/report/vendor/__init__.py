"""plotly.js, the partial bundle "basic" (scatter, bar, pie), unchanged from npm `plotly.js-basic-dist-min`.

It is the plotly.js of Python plotly 7.1; the whole bundle (4.8 MB) would not fit into a report that can be attached
to a bug. MIT licence, see LICENSE.txt beside it. To update: `npm pack plotly.js-basic-dist-min@VERSION`.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Final

__all__ = ["PLOTLYJS_VERSION", "plotlyjs"]

PLOTLYJS_VERSION: Final = "4.1.1"


def plotlyjs() -> str:
    """The bundle's source text."""
    return files(__name__).joinpath("plotly-basic.min.js").read_text(encoding="utf-8")
