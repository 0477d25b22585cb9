"""How benchmarks measure: one timer, one step, one CLIP, one floor."""
