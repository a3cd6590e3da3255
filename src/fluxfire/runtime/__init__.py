"""A pipeline at run time: its generations, its blocks, and the edits that passes made to it."""
