"""Pictures; needs the extra `viz` (matplotlib and pillow)."""

from vision_mamba.viz.orders import draw_order, draw_orders

__all__ = ["draw_order", "draw_orders"]
