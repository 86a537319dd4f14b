"""All benchmarks: `make bench`."""

from bench import language, sandbox, steps

steps.main([])
language.main([])
sandbox.main([])
