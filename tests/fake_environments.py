"""Environments for tests, of which a random model finds something to learn."""

from grpo.environments import Message, Opening, Reply
from grpo.types import Problem


class Words:
    """Three turns, each rewarded by its share of the letter that was asked for; the replies ask for another one."""

    def problems(self, split):
        return [Problem(f"{letter}:", letter) for letter in ("abcdefgh" if split == "train" else "ijkl")]

    def environment(self, problem, seed):
        return _Words(problem)


class _Words:
    def __init__(self, problem):
        self._asked, self._turns = problem.answer, 0

    async def begin(self):
        return Opening((Message("user", f"{self._asked}:"),))

    def reply(self, said):  # in a thread
        reward = said.content.count(self._asked) / max(1, len(said.content)) + 0.1 * len(said.content)
        self._asked, self._turns = chr(ord(self._asked) + 1), self._turns + 1
        return Reply((Message("user", f"{self._asked}:"),), done=self._turns == 3, reward=reward)


class WordsAtOnce(Words):
    """The same without threads: whatever is said at the same time is answered at the same time."""

    def environment(self, problem, seed):
        return _WordsAtOnce(problem)


class _WordsAtOnce(_Words):
    async def reply(self, said):
        return super().reply(said)


class Bandit:
    """Two turns of one token each. The first asks for any digit, the second for any capital letter: nothing is better.

    A policy that always does what it is asked earns 1; one that ignores what it is asked, at most 1/2.
    """

    def problems(self, split):
        return [Problem("#", "")]

    def environment(self, problem, seed):
        return _Bandit(seed)


class _Bandit:
    def __init__(self, seed):
        kinds = [("#", str.isdigit), ("?", str.isupper)]
        self._left = kinds if seed % 2 else kinds[::-1]

    async def begin(self):
        return Opening((Message("user", self._left[0][0]),))

    async def reply(self, said):
        (_, is_right), *self._left = self._left
        reward = 0.5 * is_right(said.content)
        return Reply(tuple(Message("user", sign) for sign, _ in self._left[:1]), done=not self._left, reward=reward)
