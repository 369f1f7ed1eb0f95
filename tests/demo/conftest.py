import pytest

from quantkit.demo.build import demo_checkpoint


@pytest.fixture(scope="session")
def demo():
    return demo_checkpoint()
