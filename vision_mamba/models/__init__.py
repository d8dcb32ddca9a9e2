"""Model families, one a file; importing it registers them with timm."""

from vision_mamba.models import efficientvmamba as efficientvmamba
from vision_mamba.models.localmamba import LocalVim
from vision_mamba.models.vim import VisionMamba
from vision_mamba.models.vmamba import VMamba

__all__ = ["LocalVim", "VMamba", "VisionMamba"]
