"""Find the smallest policy age and rollout concurrency that keep the trainer busy: `python scripts/tune.py --help`.

The same as `grpo tune`.
"""

from grpo.cli.tune import main

if __name__ == "__main__":
    main()
