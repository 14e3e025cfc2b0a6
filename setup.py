"""Builds mint_engine._native and maps the top-level folder ``kernels`` to ``mint_engine.kernels``.

Everything else about the package is in pyproject.toml.
"""

from __future__ import annotations

import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"]
ISA_FLAGS: dict[str, list[str]] = {
    "csrc/isa/scalar.cpp": [],
    "csrc/isa/avx2.cpp": ["-mavx2", "-mfma"],
    "csrc/isa/avx512.cpp": AVX512,
    "csrc/isa/avx512_bf16.cpp": [*AVX512, "-mavx512bf16"],
    "csrc/isa/amx.cpp": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-mprfchw"],
}
if platform.machine().lower() not in ("x86_64", "amd64"):
    ISA_FLAGS = {"csrc/isa/scalar.cpp": []}


# UBSan doubles the time to compile, and the scalar unit has every algorithm's text: the others get ASan alone.
# -Og compiles in 0.6 of -O1's time; without inlining its tests would take twice as long. The scalar unit is worth -O2:
# half a minute more to compile, and its tests, nearly half of the time of those looked at, take 0.37 of that.
INLINED = ["-finline-functions", "-finline-small-functions", "-finline-functions-called-once"]
SANITIZED = ["-Og", *INLINED, "-g1", "-fno-omit-frame-pointer", "-fsanitize=address"]
UNDEFINED = ["-fsanitize=undefined", "-fno-sanitize-recover=all"]


class BuildNative(build_ext):
    """Compiles each ISA's translation unit with its own flags, and all units at once, those that take longest first."""

    user_options: ClassVar[list[Any]] = [*build_ext.user_options, ("sanitize", None, "with AddressSanitizer and UBSan")]
    boolean_options: ClassVar[list[str]] = [*build_ext.boolean_options, "sanitize"]

    def initialize_options(self) -> None:
        super().initialize_options()
        self.sanitize = False

    def build_extension(self, ext: Extension) -> None:
        if self.sanitize:
            ext.extra_compile_args += SANITIZED
            ext.extra_link_args += ["-fsanitize=address,undefined"]
        compiler: Any = self.compiler
        compile_one = compiler._compile
        jobs: list[tuple[Any, ...]] = []

        def defer(obj: str, src: str, kind: str, cc_args: list[str], postargs: list[str], pp_opts: list[str]) -> None:
            flags = ISA_FLAGS.get(src, [])
            if self.sanitize and not flags:
                flags = [*UNDEFINED, "-O2"] if src in ISA_FLAGS else UNDEFINED
            jobs.append((obj, src, kind, cc_args, [*postargs, *flags], pp_opts))

        link = compiler.link_shared_object

        def compile_all_then_link(*args: Any, **kwargs: Any) -> None:
            with ThreadPoolExecutor(self.parallel or 2) as pool:
                list(pool.map(lambda job: compile_one(*job), sorted(jobs, key=lambda job: job[1] not in ISA_FLAGS)))
            link(*args, **kwargs)

        compiler._compile, compiler.link_shared_object = defer, compile_all_then_link
        try:
            super().build_extension(ext)
        finally:
            compiler._compile, compiler.link_shared_object = compile_one, link


native = Extension(
    "mint_engine._native",
    sources=["csrc/module.cpp", "csrc/attention_plan.cpp", "csrc/check.cpp", "csrc/scratch.cpp", *ISA_FLAGS],
    depends=[str(p) for p in Path("csrc").rglob("*.h")],
    include_dirs=[pybind11.get_include()],
    # gcc warns about its own AVX-512 headers (-Wmaybe-uninitialized); debug information would double the build time.
    # Multiply-adds are written where they are meant: left to the compiler, equal sums have other bits in other places.
    extra_compile_args=[
        *["-std=c++17", "-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=off"],
        *["-Wall", "-Wextra", "-Wno-maybe-uninitialized"],
    ],
    extra_link_args=["-fopenmp"],
    language="c++",
)

packages = {*find_packages(include=["mint_engine", "mint_engine.*", "mint", "mint.*"]), "mint_engine.kernels"}
packages |= {f"mint_engine.kernels.{name}" for name in find_packages("kernels")}

setup(
    packages=sorted(packages),
    package_dir={"mint_engine.kernels": "kernels"},
    include_package_data=False,  # the packages' own files are these, not all that MANIFEST.in puts beside them
    package_data={
        "mint": ["py.typed"],
        "mint_engine": ["py.typed"],
        "mint_engine.kernels": ["plans/*.json"],
        "mint_engine.wire": ["messages.proto", "messages.bin"],
    },
    ext_modules=[native],
    cmdclass={"build_ext": BuildNative},
)
