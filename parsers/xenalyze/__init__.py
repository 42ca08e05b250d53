"""Texts made from xentrace recordings: `xenalyze --dump-all` and the classic `xentrace_format`."""

from parsers.xenalyze.classic import ClassicReader
from parsers.xenalyze.reader import XenalyzeReader

__all__ = ["ClassicReader", "XenalyzeReader"]
