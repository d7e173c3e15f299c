"""Settings of all tests."""

from hypothesis import HealthCheck, settings

# A test may be slow on a busy machine; that says nothing about what it tests.
settings.register_profile("fedmq", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fedmq")
