"""The conversion of users' models: their noise is swapped, their training forward runs S noise samples, and runs check the results."""
