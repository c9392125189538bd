"""Import torchvision's CUDA wheel under a CPU build of torch.

torchvision's wheel registers shape functions for compiled operators that a CPU torch never loads, and fails on import.
Declaring those operators first lets `import torchvision` (and what imports it, such as timm and transformers) succeed;
its transforms then work, its compiled operators do not. For tests and benchmarks on machines without a GPU only.

    import torchvision_on_cpu_torch  # before torchvision, timm or transformers
"""

import torch

_library = torch.library.Library("torchvision", "DEF")
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_OTHERS = ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d")

for schema in _SCHEMAS:
    _library.define(schema)
for name in _OTHERS:
    _library.define(f"{name}(Tensor input) -> Tensor")
    _library.define(f"_{name}_backward(Tensor input) -> Tensor")
