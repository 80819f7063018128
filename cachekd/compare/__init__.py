"""Which variant of a pipeline is better, and how sure that is."""
