import os
import subprocess
import sys

import numpy as np
import pytest

from grpo.engines.vllm.engine import SharedBuffer, read_shared

READER = """
import sys
from grpo.engines.vllm.engine import read_shared
seen = read_shared(sys.argv[1], int(sys.argv[2]))
for _ in sys.stdin:
    print(int(seen.sum()), flush=True)
"""


def test_another_process_sees_every_write_through_one_mapping():
    buffer = SharedBuffer(1000)
    reader = subprocess.Popen(
        [sys.executable, "-c", READER, buffer.path, "1000"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with reader:
        for value in (1, 7):
            buffer.write(np.full(1000, value, np.uint8))
            reader.stdin.write("look\n")
            reader.stdin.flush()
            assert int(reader.stdout.readline()) == 1000 * value
    buffer.close()
    assert not os.path.exists(buffer.path)


def test_readers_can_not_write():
    buffer = SharedBuffer(8)
    with pytest.raises(ValueError, match="read-only"):
        read_shared(buffer.path, 8)[0] = 1
    buffer.close()


def test_contents_of_another_size_are_refused():
    buffer = SharedBuffer(8)
    with pytest.raises(ValueError, match="broadcast"):
        buffer.write(np.zeros(9, np.uint8))
    buffer.close()
