"""What `make package` tries of a wheel, in another environment and folder: no test of pytest's."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import timm
import torch

import cbn_convert
from cbn_convert.norm.kernels import KERNELS, select

SITE = Path(sysconfig.get_path("purelib"))


def main() -> None:
    assert Path(cbn_convert.__file__).is_relative_to(SITE), f"{cbn_convert.__file__} is not what was installed"
    assert select(torch.zeros(2, 2)) is KERNELS["compiled"], "the wheel has no compiled kernels"
    cbn = [str(Path(sys.executable).with_name("cbn"))]
    with tempfile.TemporaryDirectory() as folder:
        for command in (
            ["--version"],
            ["inspect", "resnet18", "--quiet"],
            ["convert", "resnet18", "--no-pretrained", "-o", "converted"],
            ["demo", "-o", "demo", "--quiet"],
        ):
            subprocess.run([*cbn, *command], cwd=folder, check=True, timeout=600)
        state = timm.create_model(f"local-dir:{folder}/converted", pretrained=True).state_dict()
        assert state["bn1.running_var"].shape == (64,)
    print(f"cbn_convert {cbn_convert.__version__} works as it is installed")


if __name__ == "__main__":
    main()
