"""The nouns of the picture, as plain classes with async methods.

`setup` does the heavy part of the construction, `close` ends threads and processes. How they become processes is
the business of grpo/cluster.
"""
