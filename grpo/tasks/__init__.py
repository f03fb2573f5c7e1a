"""A task = prompts and how to score an answer; one small file each, chosen by `task.target`."""
