"""Pictures and what they show; needs the extra `viz` (matplotlib and pillow)."""

from vision_mamba.viz.features import effective_receptive_field, feature_pca, grad_cam
from vision_mamba.viz.orders import animate_orders, draw_order, draw_orders
from vision_mamba.viz.panels import Panel, draw_panels
from vision_mamba.viz.scanned import Scan, implicit_attention, route_maps, route_outputs, scans_of

__all__ = [
    "Panel",
    "Scan",
    "animate_orders",
    "draw_order",
    "draw_orders",
    "draw_panels",
    "effective_receptive_field",
    "feature_pca",
    "grad_cam",
    "implicit_attention",
    "route_maps",
    "route_outputs",
    "scans_of",
]
