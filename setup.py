"""Compiles the kernels of csrc/; whatever else is to be said of the package is in pyproject.toml."""

import platform
from concurrent.futures import ThreadPoolExecutor
from os import cpu_count, environ
from pathlib import Path
from zlib import crc32

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

AVX512 = ["-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
FLAGS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16"],
    "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
"""what the source file of an instruction set may use; a compiler that lacks it makes an empty table of it"""

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
        "-Wno-psabi",
        *environ.get("TOKENGAME_FLAGS", "").split(),  # of scripts/sanitize
    ],
    extra_link_args=["-fopenmp", *environ.get("TOKENGAME_FLAGS", "").split()],
    optional=True,  # where they do not compile, the package works without
)


class Build(build_ext):
    """Gives each source file the flags of its instruction set, and compiles several at once."""

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


setup(ext_modules=[kernels], cmdclass={"build_ext": Build})
