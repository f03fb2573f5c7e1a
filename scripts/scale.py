"""Look at the replicas of a running run, or scale them: `python scripts/scale.py RUN_FOLDER [generator=3 ...]`.

The same as `grpo scale`.
"""

from grpo.cli.scale import main

if __name__ == "__main__":
    main()
