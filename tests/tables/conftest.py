"""A file with given content."""

import pytest


@pytest.fixture
def put(tmp_path):
    """Writes a file, and returns its path."""

    def write(name, content, encoding="utf-8"):
        path = tmp_path / name
        if isinstance(content, str):
            content = content.encode(encoding, "surrogatepass")
        path.write_bytes(content)
        return path

    return write
