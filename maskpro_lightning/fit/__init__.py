"""MaskPro in a Lightning training."""
