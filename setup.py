"""Everything is in pyproject.toml, except what is compiled: see build_backend.py."""

from setuptools import setup

from build_backend import build_base, extensions

setup(ext_modules=extensions(), options={"build": {"build_base": build_base()}})
