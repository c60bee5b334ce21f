"""What each rung is worth on an input: runs of the model, scored."""
