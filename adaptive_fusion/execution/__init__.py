"""How a request runs on a model: prepared, encoded, generated, timed and measured, and tried again lower down."""
