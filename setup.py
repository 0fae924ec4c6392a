"""What lies beside the package in a checkout travels inside it in a wheel; `rlhf.config.PROJECT`
finds it in both. All else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

TRAVELS = ("conf", "stages", "data/tiny", "requirements.lock")


class BuildPy(build_py):
    """Copies TRAVELS into the package."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for name in TRAVELS:
            source, target = Path(name), Path(self.build_lib, "rlhf", name)
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(source, target, ignore=ignored, dirs_exist_ok=True)
            else:
                shutil.copyfile(source, target)


setup(cmdclass={"build_py": BuildPy})
