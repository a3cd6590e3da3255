"""What `torch.compile` made, recorded and kept in a file that is checked before it is loaded."""
