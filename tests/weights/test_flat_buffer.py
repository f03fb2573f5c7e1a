import numpy as np
import xxhash

from grpo.weights import flat_buffer as checksum


def test_the_checksum_of_a_buffer_is_made_of_those_of_its_pieces(monkeypatch):
    content = np.random.default_rng(0).integers(256, size=1000, dtype=np.uint8)
    monkeypatch.setattr(checksum, "PIECE", 64)
    parts = [xxhash.xxh3_64_digest(content[start : start + 64].tobytes()) for start in range(0, 1000, 64)]
    assert checksum.buffer_checksum(content) == xxhash.xxh3_64_intdigest(b"".join(parts))
    for place in (0, 63, 64, 999):
        damaged = content.copy()
        damaged[place] ^= 1
        assert checksum.buffer_checksum(damaged) != checksum.buffer_checksum(content)


def test_the_checksum_of_a_file_is_that_of_the_whole_however_it_is_read(tmp_path, monkeypatch):
    content = np.random.default_rng(0).bytes(1000)
    monkeypatch.setattr(checksum, "_READ", 64)
    (tmp_path / "file").write_bytes(content)
    assert checksum.file_checksum(tmp_path / "file") == xxhash.xxh3_64_hexdigest(content)


def test_nothing_has_a_checksum_too(tmp_path):
    (tmp_path / "file").touch()
    assert checksum.buffer_checksum(np.empty(0, np.uint8)) == int(checksum.file_checksum(tmp_path / "file"), 16)
