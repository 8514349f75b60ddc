import pytest
from data.tiny import byte_level, wordpiece

from instructblip.data.tokens import Tokens


@pytest.fixture(scope="session")
def tokens() -> Tokens:
    return Tokens(language=byte_level(), qformer=wordpiece())
