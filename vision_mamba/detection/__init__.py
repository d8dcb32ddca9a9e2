"""Object detection and instance segmentation on timm backbones: what tools/train_detection.py calls."""
