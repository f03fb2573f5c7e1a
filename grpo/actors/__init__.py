"""The actors of a run as plain classes with async methods; grpo/cluster turns them into processes.

`setup` does the heavy part of construction. `close` ends threads and child processes; it may be called at any time,
also before or during `setup`. An actor without such work leaves the method out.

Example:
    class Reward:
        def __init__(self, config: RunConfig) -> None: ...
        async def setup(self) -> None: ...                       # load the tokenizer, start processes

        @batched
        async def score(self, prompt, completions) -> Scores: ...

        async def close(self) -> None: ...

    scores = await services.reward.score.route(prompt, completions)
"""
