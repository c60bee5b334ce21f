"""How good a policy is: curves against baselines, and its value on logged traffic."""
