"""The web UI: pages around the server's public endpoints. It has no other way to the model than those."""
