"""Evaluate a model on held-out prompts: `python scripts/evaluate.py [model=NAME] [task=NAME] [key=value ...]`.

The same as `grpo evaluate`.
"""

from grpo.cli.hydra_jobs import evaluate

if __name__ == "__main__":
    evaluate()
