"""Builds the CPU kernels; everything else about the package stands in pyproject.toml.

Without a compiler, or without torch at build time, the package installs all the same and runs on
pure torch; its first use warns of that, and `minrnn info` says why.
"""

import sys
from pathlib import Path

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
            [
                "minrnn/ops/cpu/register.cpp",
                "minrnn/ops/cpu/register_rows.cpp",
                "minrnn/ops/cpu/register_selective.cpp",
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
