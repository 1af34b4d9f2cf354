"""A matrix of runs: planned, run in order, and judged. docs/ablate.md says it for users."""
