"""Put the assets of `atomdiff demo` into the wheel: samples and configs become atomdiff/_assets."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ASSETS = ("samples/toybox-sd", "samples/toybox-judge", "samples/subjects", "samples/tuning_subjects", "configs")


class BuildWithAssets(build_py):
    """The usual build, and the assets; an editable install finds them in the checkout."""

    def run(self) -> None:
        """Copy the package, then the assets."""
        super().run()
        if not self.editable_mode:
            for folder in ASSETS:
                shutil.copytree(folder, Path(self.build_lib) / "atomdiff" / "_assets" / folder, dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithAssets})
