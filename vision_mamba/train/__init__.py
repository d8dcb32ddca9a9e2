"""Training and prediction on timm's parts: what tools/train.py and tools/predict.py call."""
