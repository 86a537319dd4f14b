"""All benchmarks: `make bench`."""

from bench import language, steps

steps.main([])
language.main([])
