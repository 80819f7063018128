"""From the names of two models to the file of a whole pipeline: `cachekd init`."""
