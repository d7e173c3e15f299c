"""What the configurations of recorded test runs may name: problems and algorithms in tests/."""

from fedmq.algorithms.allowed import Allowed

OWN_CODE = Allowed(modules=frozenset({"tests"}))
ALLOW = ("--allow", "tests")
