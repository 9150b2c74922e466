"""Builds the CPU kernels; everything else about the package stands in pyproject.toml.

Without a compiler, or without torch at build time, the package installs all the same and runs on
pure torch; its first use warns of that, and `minrnn info` says why.
"""

import os
import sys
from collections.abc import Callable
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class BuildNative(build_ext):
    """Compiles the sources against torch's stable ABI, which serves torch 2.10 and later."""

    def get_ext_filename(self, fullname: str) -> str:
        # no Python version in the name: the library does not use Python
        return str(Path(*fullname.split("."))) + (".dll" if sys.platform == "win32" else ".so")

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def run(self) -> None:
        try:
            import torch
        except ImportError:
            _say("no torch at build time (--no-build-isolation)")
            return
        root = Path(torch.__file__).parent
        for extension in self.extensions:
            extension.include_dirs.append(str(root / "include"))
            extension.library_dirs.append(str(root / "lib"))
        try:
            super().run()
        except Exception as error:
            _say(str(error))

    def build_extensions(self) -> None:
        self.compiler.compile = _side_by_side(self.compiler.compile)
        super().build_extensions()


def _side_by_side(compile_all: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """`compile_all`, a process of the compiler for each source at the same time."""

    def compile_each(sources: list[str], **options: Any) -> list[str]:
        with ThreadPool(min(len(sources), os.cpu_count() or 1)) as pool:
            made = pool.map(lambda source: compile_all([source], **options), sources, chunksize=1)
        return [path for paths in made for path in paths]

    return compile_each


def _say(why: str) -> None:
    """On stderr, which pip shows with -v only: the first use of the package says it again."""
    print(
        f"minrnn: the compiled kernels were not built, pure torch will run: {why}", file=sys.stderr
    )


windows = sys.platform == "win32"
setup(
    cmdclass={"build_ext": BuildNative},
    ext_modules=[
        Extension(
            "minrnn.ops._native",
            # those that take longest first
            [
                f"minrnn/ops/cpu/{name}.cpp"
                for name in (
                    "kernels_half",
                    "kernels_float",
                    "register_rows",
                    "register",
                    "register_selective",
                )
            ],
            depends=[str(path) for path in Path("minrnn/ops/cpu").glob("*.h")],
            define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
            libraries=["torch", "torch_cpu", "c10"],
            extra_compile_args=["/O2", "/std:c++17"]
            if windows
            else [
                "-O3",
                "-std=c++17",
                "-fno-trapping-math",
                "-fvisibility=hidden",
                "-g0",
                "-Wno-psabi",
            ],
        )
    ],
)
