import numpy as np
import xxhash

from grpo import checksum


def test_a_checksum_is_that_of_the_whole_however_it_is_read(tmp_path, monkeypatch):
    content = np.random.default_rng(0).integers(256, size=1000, dtype=np.uint8)
    expected = xxhash.xxh3_64(content.tobytes())
    monkeypatch.setattr(checksum, "_PIECE", 64)
    (tmp_path / "file").write_bytes(content.tobytes())
    assert checksum.buffer_checksum(content) == expected.intdigest()
    assert checksum.file_checksum(tmp_path / "file") == expected.hexdigest()


def test_nothing_has_a_checksum_too(tmp_path):
    (tmp_path / "file").touch()
    assert checksum.buffer_checksum(np.empty(0, np.uint8)) == int(checksum.file_checksum(tmp_path / "file"), 16)
