"""Train a language model with GRPO: `python scripts/train.py [+experiment=NAME] [key=value ...]`.

The same as `grpo train`.
"""

from grpo.cli.hydra_jobs import train

if __name__ == "__main__":
    train()
