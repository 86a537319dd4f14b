"""All benchmarks of speed: `make bench`. What faults cost is `python -m bench.chaos`, which takes minutes."""

from bench import language, retrieval, sandbox, steps

steps.main([])
language.main([])
retrieval.main([])
sandbox.main([])
