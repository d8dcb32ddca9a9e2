"""Training, validation, prediction and conversion on timm's parts: what the tools of these names call."""
