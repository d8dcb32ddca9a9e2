"""Models as files that other programs run: torch.export, AOTInductor, ONNX, TorchScript; each checked before it stands.

>>> import timm, vision_mamba.export
>>> model = timm.create_model("test_vmamba", num_classes=10).eval()
>>> vision_mamba.export.refusal("torchscript", vision_mamba.export.Request(model, (64, 64))) is None
True
"""

from vision_mamba.export.formats import FORMATS, Format, Program, Request, refusal
from vision_mamba.export.write import Exported, ExportError, export_model, median_ms

__all__ = ["FORMATS", "ExportError", "Exported", "Format", "Program", "Request", "export_model", "median_ms", "refusal"]
