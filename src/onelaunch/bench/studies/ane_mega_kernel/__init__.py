"""A transformer as few programs, and training around it: a published study, asked here."""
