"""What pyproject.toml cannot say: recipes/ goes into the installed package, as qlora/shipped/."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithRecipes(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:
            shutil.copytree("recipes", Path(self.build_lib, "qlora", "shipped"), dirs_exist_ok=True)


setup(cmdclass={"build_py": WithRecipes})
