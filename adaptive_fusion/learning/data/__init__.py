"""Logs and labels, and the training matrix made of them."""
