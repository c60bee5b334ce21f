"""Fusion modules trained from a frozen model's own answers."""
