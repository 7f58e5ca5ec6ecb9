"""Make a plan from rules and sites, and explain why a rule or a role has no site."""
