"""Bringing a policy to live traffic: shadow runs beside it."""
