"""Hardware has no policy."""

from __future__ import annotations

__all__ = ["Hardware"]


class Hardware:
    """The one policy of a policy-free model."""

    name = "any"
