"""Find settings for rollout concurrency and policy age: from short runs, or simulated from the timeline of a run."""
