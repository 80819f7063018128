"""The tail sketch: what a cache keeps of the logprobs beyond top-k."""
