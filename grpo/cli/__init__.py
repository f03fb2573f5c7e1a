"""The commands behind the scripts and the `grpo` console command."""
