"""Make an ordinary Hugging Face folder of a checkpoint: `python scripts/export.py CHECKPOINT_OR_RUN_FOLDER OUT`.

The same as `grpo export`.
"""

from grpo.cli.export import main

if __name__ == "__main__":
    main()
