"""Models of others made to run S noise samples: what is swapped, how it runs, and the check that it is right."""
