"""`python -m grpo.cli COMMAND`: the `grpo` command where it is not on the PATH."""

from grpo.cli.main import main

if __name__ == "__main__":
    main()
