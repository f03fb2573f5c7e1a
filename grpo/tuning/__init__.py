"""What rollout concurrency and policy age do to a run: measured in short runs, or simulated from a timeline."""
