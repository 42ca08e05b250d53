"""Builds the package: setuptools, and in a wheel the machines are compiled by mypyc where there is a C compiler.

Without a compiler, or when compiling fails, the wheel has the same sources interpreted; `tracetool --version` says
which. An editable installation never compiles. `TRACETOOL_COMPILE=0` leaves it out, `TRACETOOL_COMPILE=1` makes a
failure an error. What a compiled wheel is made of lies in a temporary folder under build/, which is removed.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable", "build_sdist", "build_wheel", "extensions", "get_requires_for_build_editable",
    "get_requires_for_build_sdist", "get_requires_for_build_wheel", "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel", "why_not",
]  # fmt: skip

HERE: Final = Path(__file__).resolve().parent
REQUIRES: Final = ["mypy[mypyc]>=1.11"]
#: -O2, and one C file for each module: the compiler needs seconds and little memory for each.
OPT_LEVEL: Final = os.environ.get("MYPYC_OPT_LEVEL", "2")

#: While a wheel is built: where C files go, relative to setup.py (setuptools refuses anything else). None: setup.py
#: compiles nothing.
_folder: Path | None = None


def _say(text: str) -> None:
    print(f"tracetool: {text}", file=sys.stderr, flush=True)


def why_not() -> str | None:
    """Why nothing will be compiled; None when a C compiler makes an extension from Python.h."""
    if os.environ.get("TRACETOOL_COMPILE") == "0":
        return "TRACETOOL_COMPILE=0"
    from setuptools import Distribution, Extension
    from setuptools.errors import BaseError, CompileError, LinkError, PlatformError

    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "probe.c")
        source.write_text(
            "#include <Python.h>\n"
            'static struct PyModuleDef m = {PyModuleDef_HEAD_INIT, "probe", 0, -1, 0};\n'
            "PyMODINIT_FUNC PyInit_probe(void) { return PyModule_Create(&m); }\n"
        )
        distribution = Distribution({"name": "probe", "ext_modules": [Extension("probe", [str(source)])]})
        command: Any = distribution.get_command_obj("build_ext")
        command.build_lib = command.build_temp = scratch
        try:
            with Path(os.devnull).open("w") as nothing, contextlib.redirect_stdout(nothing):
                command.ensure_finalized()
                command.run()
        except (BaseError, CompileError, LinkError, PlatformError, OSError) as error:
            return f"no working C compiler ({error})"
    return None


def extensions() -> list[Any]:
    """What setup.py builds: the modules of replay/compiled.py while a wheel is built, else nothing."""
    if _folder is None:
        return []
    from mypyc.build import mypycify

    modules = runpy.run_path(str(HERE / "replay" / "compiled.py"))["MODULES"]
    options = ["--config-file=", f"--cache-dir={_folder / 'cache'}", "--ignore-missing-imports"]
    made: list[Any] = mypycify(
        [*options, *modules],
        opt_level=OPT_LEVEL, debug_level="0", multi_file=True, target_dir=(_folder / "c").as_posix(),
    )  # fmt: skip
    return made


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """Setuptools' needs, and mypyc where it can be of use."""
    needs: list[str] = build_meta.get_requires_for_build_wheel(config_settings)
    return needs if why_not() else [*needs, *REQUIRES]


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    """A wheel with the machines compiled, or else one with the same sources only; a line on stderr says which."""
    global _folder
    reason = why_not()
    before = sys.argv[:]
    if reason is None:
        (HERE / "build").mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="mypyc-", dir=HERE / "build") as scratch:
            _folder = Path(scratch).relative_to(HERE)
            try:
                _say("compiling the machines with mypyc, for a minute or two (TRACETOOL_COMPILE=0 leaves it out)")
                return str(build_meta.build_wheel(wheel_directory, config_settings, metadata_directory))
            except (Exception, SystemExit) as error:  # mypyc ends the process where it finds fault
                if os.environ.get("TRACETOOL_COMPILE") == "1":
                    raise
                reason = f"compiling failed ({type(error).__name__}: {error})"
            finally:
                _folder = None
                sys.argv[:] = before
    elif os.environ.get("TRACETOOL_COMPILE") == "1":
        raise RuntimeError(reason)
    _say(f"the machines are not compiled and will run interpreted: {reason}")
    return str(build_meta.build_wheel(wheel_directory, config_settings, metadata_directory))


def build_base() -> str:
    """Where setuptools puts what it builds on the way; its own default, unless a wheel is compiled."""
    return "build" if _folder is None else (_folder / "build").as_posix()
