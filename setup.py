"""The lock travels in the wheel, where `rlhf doctor` reads it. All else is in pyproject.toml."""

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildPy(build_py):
    """Copies requirements.lock into the package."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            self.copy_file("requirements.lock", f"{self.build_lib}/rlhf/requirements.lock")


setup(cmdclass={"build_py": BuildPy})
