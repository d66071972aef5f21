"""A prepared folder."""

import pytest
from experiment_cases import write_prepared


@pytest.fixture
def prepared(tmp_path):
    write_prepared(tmp_path / "prepared")
    return tmp_path / "prepared"
