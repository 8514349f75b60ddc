import pytest

from instructblip.data.tokens import Tokens
from tests.testing import byte_level, wordpiece


@pytest.fixture(scope="session")
def tokens() -> Tokens:
    return Tokens(language=byte_level(), qformer=wordpiece())
