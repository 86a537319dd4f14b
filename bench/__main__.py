"""All benchmarks: `make bench`."""

from bench import steps

steps.main([])
