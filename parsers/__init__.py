"""Recordings in, Arrow tables out.

This package knows formats, clocks and tables. It knows nothing of interrupts (that is `replay`) and prints
nothing (that is `tracetool`). It must not import either of them.
"""
