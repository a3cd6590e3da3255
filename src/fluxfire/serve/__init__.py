"""An HTTP service that edits pictures."""
