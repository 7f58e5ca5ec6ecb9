"""Rules and sites make a plan; and why a rule or a role has no site."""
