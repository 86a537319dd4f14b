"""All benchmarks: `make bench`."""

from bench import language, retrieval, sandbox, steps

steps.main([])
language.main([])
retrieval.main([])
sandbox.main([])
