"""What the published figures say: one function a region, one file a subject."""
