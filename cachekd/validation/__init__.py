"""Held-out data while a student trains: settings, what is opened, evaluations, the best student."""
