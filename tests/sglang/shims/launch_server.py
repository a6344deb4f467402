"""`python -m sglang.launch_server` on a CPU without the CPU build of sgl-kernel. For tests only.

1. `sgl_kernel` is the stand-in beside this file: Python finds it, because the directory of a script comes first.
2. torchvision's wheel has its operators for CUDA and none that loads beside a CPU torch, and fails at its import to
   describe one that is not there. The two that it describes are declared here, without an implementation.

SGLang spawns its workers, and each of them imports this file again as its main module before anything else.
"""

from __future__ import annotations

import runpy

import torch


_OPERATORS = torch.library.Library("torchvision", "DEF")
"""Kept: what it declares goes with it."""
_OPERATORS.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_OPERATORS.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
