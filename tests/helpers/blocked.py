"""Python in which some packages are not installed, whatever the environment holds."""

from collections.abc import Iterable
from pathlib import Path


def block(folder: Path, modules: Iterable[str]) -> None:
    """Hide top-level `modules` from every Python, worker processes included, that has `folder` first on PYTHONPATH."""
    (folder / "sitecustomize.py").write_text(f"""
import importlib.util, sys
BLOCKED = frozenset({sorted(modules)})
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
find = importlib.util.find_spec  # libraries ask it what is installed
importlib.util.find_spec = lambda name, *args: None if name.split(".")[0] in BLOCKED else find(name, *args)
sys.meta_path.insert(0, Blocker())
""")
