"""Tasks: prompts and the scoring of answers, one file each, selected by `task.target`."""
