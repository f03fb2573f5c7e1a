"""Make a page of a run, or of several side by side: `python scripts/report.py RUN_FOLDER [RUN_FOLDER ...]`.

The same as `grpo report`.
"""

from grpo.cli.report import main

if __name__ == "__main__":
    main()
