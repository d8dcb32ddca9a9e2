"""Modules that take a scan order: the token mixers of every family, stems and downsamplings. All channels last."""

from vision_mamba.layers.bimamba import BiMamba
from vision_mamba.layers.mamba import Mamba
from vision_mamba.layers.mamba2 import Mamba2
from vision_mamba.layers.sequence import MixerStack, SequenceClassifier
from vision_mamba.layers.ss2d import SS2D, SSD2D

__all__ = ["SS2D", "SSD2D", "BiMamba", "Mamba", "Mamba2", "MixerStack", "SequenceClassifier"]
