"""Settings of all tests."""

import pytest
from hypothesis import HealthCheck, settings

# A test may be slow on a busy machine; that says nothing about what it tests.
settings.register_profile("fedmq", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fedmq")


@pytest.fixture(autouse=True, scope="session")
def _no_test_uses_the_users_own_folder(tmp_path_factory):
    """Give the tests, and the processes that they start, a user without configuration or keys."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        for each in ("FEDMQ_KEYS", "FEDMQ_BROKER_KEY", "FEDMQ_JOIN"):
            patch.delenv(each, raising=False)
        yield
