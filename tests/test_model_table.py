"""Every family of mlx-lm: three steps with its losses, or a refusal that docs/models.md has."""

import importlib

import pytest

import model_table
import tiny_models

DOCUMENTED = model_table.documented()


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_family(family):
    try:
        importlib.import_module(f"mlx_lm.models.{family}")
    except ImportError:
        pytest.skip("this mlx-lm does not have it")
    assert model_table.outcome(family) == DOCUMENTED[family]


def test_the_table_has_them_all():
    assert set(DOCUMENTED) == {*tiny_models.FAMILIES, *tiny_models.UNBUILDABLE}
    trained = [family for family, (path, _) in DOCUMENTED.items() if path in ("fast", "generic")]
    assert len(trained) >= 40
