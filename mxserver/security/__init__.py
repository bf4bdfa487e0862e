"""Who may do what: roles, tokens, limits. docs/threat-model.md names the boundaries."""
