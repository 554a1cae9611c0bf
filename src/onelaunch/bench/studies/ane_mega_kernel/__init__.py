"""A transformer as few programs, and training around it: a published study, repeated here."""
