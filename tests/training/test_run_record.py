"""What a run records of the machine and the code that it runs on."""

import atomdiff
from atomdiff.training.run_record import describe_environment


def test_code_below_a_namespace_package_is_described_too(monkeypatch):
    environment = describe_environment()
    monkeypatch.delattr(atomdiff, "__file__")  # as where a folder named atomdiff hides the package
    assert describe_environment() == environment
