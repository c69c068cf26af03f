"""Compiles the kernels of csrc/; whatever else is to be said of the package is in pyproject.toml.

Python never imports the library: ctypes opens it by its path (tokengame/kernels/library.py). So its name, and that of
the wheel, say nothing of a version of Python.
"""

import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from os import cpu_count, environ
from pathlib import Path
from zlib import crc32

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

AVX512 = ["-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
FLAGS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16"],
    "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
"""what the source file of an instruction set may use; a compiler that lacks it makes an empty table of it"""

FOR_DEBUGGING = environ.get("TOKENGAME_FLAGS", "").split()
"""of scripts/sanitize, which shows lines of the sources"""
STRIPPED = [] if FOR_DEBUGGING or not sys.platform.startswith("linux") else ["-Wl,--strip-all"]

sources = sorted(Path("csrc").glob("*.cpp"))
headers = sorted(Path("csrc").glob("*.h"))
checksum = crc32(b"".join(path.read_bytes() for path in sources + headers))  # as in tokengame/kernels/library.py
kernels = Extension(
    "tokengame._kernels",
    sources=[str(path) for path in sources],
    depends=[str(path) for path in headers],
    define_macros=[("SOURCES", f"{checksum}u")],
    extra_compile_args=[
        "-O3",
        "-std=c++17",
        "-fopenmp",
        "-fvisibility=hidden",
        "-Wno-maybe-uninitialized",
        "-Wno-uninitialized",  # of GCC 12's own headers
        "-Wno-psabi",
        "-g0",
        *FOR_DEBUGGING,
    ],
    # without -fopenmp: the functions of OpenMP are PyTorch's, whatever its file is called; a second one has own threads
    extra_link_args=[*STRIPPED, *FOR_DEBUGGING],
    optional=True,  # where they do not compile, the package works without
)


class Build(build_ext):
    """Gives each source file the flags of its instruction set, and compiles several at once."""

    def get_ext_filename(self, fullname: str) -> str:
        """The same for any Python."""
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext: Extension) -> None:
        """Compile and link."""
        compile_one = self.compiler._compile

        def compile_file(obj, source, extension, arguments, extra, options):
            flags = FLAGS.get(Path(source).stem, []) if platform.machine() in ("x86_64", "AMD64") else []
            try:
                compile_one(obj, source, extension, arguments, [*extra, *flags], options)
            except Exception:
                if not flags:
                    raise
                compile_one(obj, source, extension, arguments, extra, options)

        self.compiler._compile = compile_file
        compile_all = self.compiler.compile

        def compile_files(files, **settings):
            with ThreadPoolExecutor(cpu_count()) as pool:
                return [obj for objs in pool.map(lambda file: compile_all([file], **settings), files) for obj in objs]

        self.compiler.compile = compile_files
        super().build_extension(ext)


class Wheel(bdist_wheel):
    """One for any Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        """Python, its binary interface, the platform."""
        return "py3", "none", super().get_tag()[2]


setup(ext_modules=[kernels], cmdclass={"build_ext": Build, "bdist_wheel": Wheel})
