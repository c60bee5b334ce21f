"""From logs to a policy in service, again and again: the steps, where they are, and what they will do."""
