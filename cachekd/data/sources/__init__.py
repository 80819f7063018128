"""Each kind of data set, by the same protocol."""
