"""What is measured, and against what: a module for each benchmark, with a `run(quick)` that gives figures."""
