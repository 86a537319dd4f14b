"""What a machine that has nothing is given: a private Redis and a worker."""
