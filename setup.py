"""Builds the compiled core: every .pyx below mxcore/ becomes an extension module of the same name.

One stable-ABI wheel serves CPython 3.11 and later; a free-threaded Python gets a build of its own. MX_COMPILE=0
compiles nothing (the Makefile compiles in place, and lets pip only note where the packages are). CFLAGS come after our
own flags, and so win over them; symbols are left out unless they say -g.
Extensions are compiled side by side, as many as there are cores.
"""

import os
import re
import shlex
import shutil
import sysconfig
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")
SOURCES = sorted((ROOT / "mxcore").rglob("*.pyx")) if os.environ.get("MX_COMPILE", "1") != "0" else []
MORE_FLAGS = shlex.split(os.environ.get("CFLAGS", ""))
FLAGS = ["-O3", "-g0", "-std=gnu11", "-fvisibility=hidden", *MORE_FLAGS]  # Python's own flags begin with -g
STRIPPED = [] if {"-g", "-g1", "-g2", "-g3", "-ggdb"} & {*MORE_FLAGS} else ["-s"]
INCLUDED = re.compile(r'^\s*(?:#include|cdef extern from) "([\w/]+\.h)"|^from (mxcore[\w.]*) cimport', re.MULTILINE)


def included(source: Path, found: set[str] | None = None) -> set[str]:
    """The headers and .pxd files that a source includes, those that these include, and so on."""
    found = set() if found is None else found
    for header, module in INCLUDED.findall(source.read_text()):
        name = header or module.replace(".", "/") + ".pxd"
        for path in (source.parent / name, ROOT / "mxcore" / name, ROOT / "third_party/xxhash" / name, ROOT / name):
            if path.is_file() and str(path.relative_to(ROOT)) not in found:
                found.add(str(path.relative_to(ROOT)))
                included(path, found)
    return found


def extension(source: Path) -> Extension:
    relative = source.relative_to(ROOT)
    return Extension(
        ".".join(relative.with_suffix("").parts),
        [str(relative)],
        include_dirs=["third_party/xxhash", "mxcore"],
        depends=sorted(included(source)),
        extra_compile_args=FLAGS,
        extra_link_args=[*MORE_FLAGS, *STRIPPED],
        libraries=["dl", "pthread"],
        define_macros=[("Py_LIMITED_API", "0x030B0000")] if LIMITED_API else [],
        py_limited_api=LIMITED_API,
    )


class BuildSideBySide(build_ext):
    """All cores, and one line where nothing can compile."""

    def run(self) -> None:
        compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[0]
        if shutil.which(compiler) is None:
            raise SystemExit(
                f"mx-modelexpress is compiled, and there is no compiler {compiler}: install one "
                "(Debian, Ubuntu: apt-get install gcc libc6-dev; or CC=its path), or install a wheel"
            )
        self.parallel = self.parallel or os.cpu_count()
        super().run()


setup(
    cmdclass={"build_ext": BuildSideBySide},
    ext_modules=cythonize(
        [extension(source) for source in SOURCES],
        build_dir="build/cython",
        language_level=3,
        compiler_directives={"binding": True, "embedsignature": True, "embedsignature.format": "python"},
    ),
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if LIMITED_API else {},
)
