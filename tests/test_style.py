"""The repository is in order: linting, formatting, what lies at the top, requirements, and the README's commands."""

import re
import subprocess
import sys

import pytest

from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", [("check",), ("format", "--check")])
def test_ruff(command):
    done = subprocess.run([sys.executable, "-m", "ruff", *command, ROOT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_nothing_else_lies_at_top_level():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    top = {name.split("/")[0] for name in tracked.splitlines() if not name.startswith(".")}
    scripts = {"train_sd1-5_naruto.py", "sd_config.py", "infer.py"}
    assert top <= scripts | {"requirements.txt", "README.md", "tests", "images"}


def test_the_readme_is_complete_and_runs_the_tests_like_ci():
    assert "@@" not in README  # which marks what is still to be measured
    (command,) = re.findall(r"^python -m pytest .*$", (ROOT / ".ci/run").read_text(), re.M)
    assert f"&& {command}\n" in README


def test_requirements_are_the_seven_packages_with_both_bounds():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    names = ["torch", "torchvision", "diffusers", "transformers", "accelerate", "datasets", "swanlab"]
    assert [re.split("[<>=!]", line)[0] for line in lines] == names
    assert all(re.fullmatch(r"\w+>=[\d.]+(,!=2.13.0)?,<[\d.]+", line) for line in lines)
