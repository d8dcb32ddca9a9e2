"""Model families, one a file; importing it registers them with timm."""

from vision_mamba.models import efficientvmamba as efficientvmamba
from vision_mamba.models.localmamba import LocalVim
from vision_mamba.models.mambavision import MambaVision
from vision_mamba.models.plainmamba import PlainMamba
from vision_mamba.models.videomamba import VideoMamba
from vision_mamba.models.vim import VisionMamba
from vision_mamba.models.vmamba import VMamba
from vision_mamba.models.vssd import VSSD

__all__ = ["VSSD", "LocalVim", "MambaVision", "PlainMamba", "VMamba", "VideoMamba", "VisionMamba"]
