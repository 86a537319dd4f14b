"""Step types, one file each: what an author may write, what it does, how often it is tried."""
