"""The nouns of the picture, as plain classes with async methods.

`setup` does the heavy part of the construction, `close` ends threads and processes: it may come at any time, also
before `setup` or while that runs. How they become processes is the business of grpo/cluster.
"""
