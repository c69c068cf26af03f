"""Compiles the kernels of csrc/; whatever else is to be said of the package is in pyproject.toml."""

from pathlib import Path
from zlib import crc32

from setuptools import Extension, setup

sources = sorted(Path("csrc").glob("*.cpp"))
headers = sorted(Path("csrc").glob("*.h"))
checksum = crc32(b"".join(path.read_bytes() for path in sources + headers))  # as in tokengame/kernels/library.py
kernels = Extension(
    "tokengame._kernels",
    sources=[str(path) for path in sources],
    depends=[str(path) for path in headers],
    define_macros=[("SOURCES", f"{checksum}u")],
    extra_compile_args=["-O3", "-std=c++17", "-fopenmp", "-Wno-maybe-uninitialized", "-Wno-uninitialized"],
    optional=True,  # where they do not compile, the package works without
)
setup(ext_modules=[kernels])
