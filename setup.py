"""Builds the package; what it is stands in setup.cfg.

The one step of its own puts the firmware's settings, checked, beside the modules: the environment variable
CARAMEL_BAKE names the file they are in. What that means stands in packaging/bake.py.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

from setuptools import setup
from setuptools.command.build_py import build_py

PACKAGE = "caramel_embedded"


def _bake() -> ModuleType:
    # By its path: a folder called "packaging" on the import path would stand in front of the library of that name.
    spec = importlib.util.spec_from_file_location("bake", Path(__file__).parent / "packaging" / "bake.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildAndBake(build_py):
    """build_py, and then the settings of the firmware that this is built for."""

    def run(self) -> None:
        bake = _bake()
        try:
            conf = bake.environment()
            if getattr(self, "editable_mode", False):
                # The modules stay in the source tree, where no build may leave anything behind.
                if conf is not None:
                    raise bake.BakeError("CARAMEL_BAKE: an editable installation can't hold baked-in settings")
                super().run()
                return
            # Before anything is copied: a bad setting leaves no half of a build.
            baked = bake.bake(conf)
        except bake.BakeError as error:
            raise SystemExit(f"caramel-embedded: {error}") from None
        super().run()
        for remark in baked.remarks:
            self.announce(f"caramel-embedded: {remark}", 3)
        self._baked = [str(path) for path in baked.write(Path(self.build_lib) / PACKAGE)]

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """Also the baked files, so that ``install --record`` knows of them."""
        outputs: list[str] = super().get_outputs(include_bytecode)
        return outputs + getattr(self, "_baked", [])


setup(cmdclass={"build_py": BuildAndBake})
