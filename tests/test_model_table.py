"""Tests that every mlx-lm family either trains for three steps with the same losses as in mlx-lm or
is refused, as listed in docs/models.md."""

import mlx_lm
import pytest

import model_table
from lib import tiny_models

pytestmark = pytest.mark.acceptance

DOCUMENTED = model_table.documented()


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.skipif(
    mlx_lm.__version__ != "0.32.2", reason="the table is for another version of mlx-lm"
)
def test_family(family):
    assert model_table.outcome(family) == DOCUMENTED[family]


def test_the_table_has_them_all():
    assert set(DOCUMENTED) == {*tiny_models.FAMILIES, *tiny_models.UNBUILDABLE}
    trained = [family for family, (path, _) in DOCUMENTED.items() if path in ("fast", "generic")]
    assert len(trained) >= 40
