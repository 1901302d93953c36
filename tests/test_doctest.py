"""The examples in the docstrings run, and the functions that most people meet first have one."""

import ast
import doctest
import importlib
from pathlib import Path

import pytest
import torch

import vaelib

FOLDER = Path(vaelib.__file__).parent
PATHS = {".".join(path.relative_to(FOLDER).with_suffix("").parts): path for path in sorted(FOLDER.rglob("*.py"))}
MODULES = [name for name in PATHS if "__" not in name]
MOST_USED = [
    *("load_images", "mlp_vae", "conv_vae", "TrainConfig", "fit", "evaluate", "generate", "reconstruct", "LatentIndex"),
    *("gaussian_kl", "save", "load"),
]


def examples_in(module):
    """The examples of a module's own docstrings, as `pytest --doctest-modules` finds them."""
    return [found for found in doctest.DocTestFinder().find(importlib.import_module(f"vaelib.{module}")) if found.examples]


def with_example():
    """The modules whose source has an example somewhere: the others are not searched."""
    return [module for module in MODULES if ">>> " in PATHS[module].read_text()]


@pytest.mark.parametrize("module", with_example())
def test_every_example_in_a_docstring_gives_what_it_shows(module):
    found = examples_in(module)
    assert found
    torch.manual_seed(0)
    runner = doctest.DocTestRunner(verbose=False)
    for example in found:
        result = runner.run(example)
        assert result.attempted > 0
        assert result.failed == 0, f"{example.name}: the difference is printed above"


@pytest.mark.parametrize("name", MOST_USED)
def test_a_function_that_everybody_needs_has_an_example_of_at_most_four_lines_that_shows_a_result(name):
    documented = getattr(vaelib, name)
    examples = doctest.DocTestParser().get_examples(documented.__doc__)
    assert any(example.want for example in examples)
    calls = [node for example in examples for node in ast.walk(ast.parse(example.source)) if isinstance(node, ast.Attribute)]
    assert name in {node.attr for node in calls}
    shown = [line for example in examples for line in example.source.splitlines() if not line.startswith("import")]
    assert len(shown) <= 4
