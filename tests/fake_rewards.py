"""Rewards that the tests put in place of real ones. Apart from fakes.py: processes that score import no torch."""

import os
import time

from grpo.errors import RewardTimeout


def vowel_share(problem, completions):
    """Varies within a group even for a random model, so that there is something to learn."""
    return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in completions]


def raising(problem, completions):
    raise ValueError("cannot score this")


def sometimes_raising(problem, completions):
    if len(problem.question) % 2:
        raise ValueError("an odd question")
    return vowel_share(problem, completions)


def sometimes_timing_out(problem, completions):
    if len(problem.question) == 5:
        raise RewardTimeout("timeout: took longer than 1 s and was killed")
    return sometimes_raising(problem, completions)


def sometimes_equal(problem, completions):
    """Nothing can be learned from questions of an odd length."""
    return [0.0] * len(completions) if len(problem.question) % 2 else vowel_share(problem, completions)


def not_a_number(problem, completions):
    return [float("nan")] * len(completions)


def too_few(problem, completions):
    return [0.0]


def dying(problem, completions):
    os._exit(7)


def raising_on_pairs(problem, completions):
    return raising(problem, completions) if len(completions) == 2 else vowel_share(problem, completions)


def raising_or_dying(problem, completions):
    raising(problem, completions) if len(completions) == 1 else dying(problem, completions)


def process(problem, completions):
    return [float(os.getpid())] * len(completions)


def sleeping(problem, completions):
    time.sleep(3600)


def greedy(problem, completions):
    return [float(len(bytearray(2**40))) for _ in completions]


def failing_in_every_way(problem, completions):
    """By the length of the question, sign included: 5 hangs, 6 crashes, 7 is not a number, 4 is fine."""
    if len(problem.question) == 5:
        sleeping(problem, completions)
    if len(problem.question) == 6:
        os._exit(1)
    if len(problem.question) == 7:
        return not_a_number(problem, completions)
    return vowel_share(problem, completions)
