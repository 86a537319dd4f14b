"""All benchmarks: `make bench`."""

from bench import language, retrieval, steps

steps.main([])
language.main([])
retrieval.main([])
