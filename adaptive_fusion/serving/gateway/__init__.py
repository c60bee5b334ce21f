"""A proxy before any engine with OpenAI's API: images are brought to the size that their question needs."""
