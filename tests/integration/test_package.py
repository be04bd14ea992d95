"""The package itself."""

import subprocess
import sys

import pytest

import atomdiff


def test_importing_it_is_cheap_and_loads_no_library():
    code = "import atomdiff, sys; assert not {'torch', 'peft', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "line",
    [
        "from atomdiff import MonaConfig",
        "import atomdiff.training.dreambooth",
        "import atomdiff.export.extract",
        "import atomdiff.concepts.parameter_count",
    ],
)
def test_peft_knows_the_methods_wherever_configs_are_read(line):
    known = "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as known"
    code = f"{line}; {known}; assert {{'ATOMS', 'MONA', 'CONV_ADAPTER', 'COEFF_TUNING', 'COMBINED'}} <= set(known)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_public_names_are_there():
    assert dir(atomdiff) == sorted(atomdiff.__all__) == atomdiff.__all__
    assert all(callable(getattr(atomdiff, name)) for name in atomdiff.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        atomdiff.nothing  # noqa: B018
