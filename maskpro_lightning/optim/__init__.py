"""MaskPro as an optimizer, and the step of the masks."""
