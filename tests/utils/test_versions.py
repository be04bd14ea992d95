from atomdiff.utils.machine import describe_processor
from atomdiff.utils.versions import versions


def test_a_figure_names_its_processor():
    assert versions()["machine"] == describe_processor()
