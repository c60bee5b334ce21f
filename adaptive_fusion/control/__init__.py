"""The controller: which of the candidates a request takes, and what it learns of what they took."""
