"""Vision state-space backbones as timm models, on a selective scan that needs no compiler to install.

Importing the package registers every model with timm::

    import timm, vision_mamba
    model = timm.create_model("vmamba_tiny_s1l8")
"""

from vision_mamba import models, ops, scans
from vision_mamba.version import __version__

__all__ = ["__version__", "models", "ops", "scans"]
