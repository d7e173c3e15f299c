"""Who may connect to a broker, and what each key may do; CURVE keys and invites as files."""
