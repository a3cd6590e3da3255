"""What passes are built from: attention, modulations, and weights and methods that stand aside."""
