"""A proxy in front of somebody else's engine that plans what is sent to it."""
