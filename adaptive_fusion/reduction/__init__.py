"""Fewer visual tokens: pure tensor modules that know no model family."""
