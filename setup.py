"""Builds the CPU kernels; a machine without a C++ compiler does without them (cbn_convert/norm/kernels)."""

import platform

from setuptools import Extension, setup

FLAGS = ["-O3", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fno-exceptions", "-fno-rtti"]
if platform.machine() in ("x86_64", "AMD64"):
    FLAGS += ["-mavx2", "-mfma"]

setup(
    ext_modules=[
        Extension(
            "cbn_convert.norm.kernels._passes",
            ["cbn_convert/norm/kernels/passes.cpp"],
            extra_compile_args=FLAGS,
            extra_link_args=["-fopenmp"],
            optional=True,
        )
    ]
)
