"""Reward functions for the reward actor's processes, which import this file: nothing heavy here."""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import os
import time

import numpy as np

from grpo.errors import RewardTimeout


def lengths(problem, texts):
    return [len(text) for text in texts]


def numpy_halves(problem, texts):
    return np.full(len(texts), 0.5, dtype=np.float32)


def processes(problem, texts):
    return [float(os.getpid())] * len(texts)


def needs_no_judge(problem, texts):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.map(len, texts)


class OddRewardError(RewardTimeout):
    def __init__(self, code, detail):
        super().__init__(f"{code}: {detail}")


def odd(problem, texts):
    raise OddRewardError(7, "no judge")


def by_the_first_text(problem, texts):
    """Does what the first text asks for: one reward for many ways to fail."""
    match texts[0]:
        case "a":
            time.sleep(600)
        case "b":
            os._exit(1)
        case "c":
            ctypes.string_at(0)
        case "d":
            np.ones(1 << 28)
        case "e":
            raise KeyError("gold")
        case "f":
            return [0.0, math.nan]
        case "g":
            return [0.0, -math.inf]
        case "h":
            return [1.0] * (len(texts) - 1)
        case "i":
            return ["good", "bad"]
        case "j":
            return None
        case "k":
            raise SystemExit(2)
        case "l":
            odd(problem, texts)
    return [1.0] * len(texts)
