import itertools

import pytest

from atomdiff.captions import tag_orders


def test_few_tags_come_in_all_orders():
    expected = {", ".join(order) for order in itertools.permutations(["sks mug", "red", "on a table"])}
    orders = tag_orders("sks mug, red,on a table", 0, seed=0)
    assert set(orders) == expected and len(orders) == 6


def test_many_tags_come_in_sixteen_orders_drawn_from_the_seed():
    caption = ", ".join("abcdefgh")
    orders = tag_orders(caption, 2, seed=0)
    assert len(orders) == 16 == len(set(orders))
    for order in orders:
        assert order.startswith("a, b, ") and sorted(order.split(", ")) == list("abcdefgh")
    assert orders == tag_orders(caption, 2, seed=0) != tag_orders(caption, 2, seed=1)
    assert len({order.split(", ")[2] for order in orders}) > 3


@pytest.mark.parametrize("caption", ["a photo of sks mug", "sks mug,", "sks, mug", ""])
def test_captions_without_tags_to_move_stay_as_they_are(caption):
    assert tag_orders(caption, 1, seed=0) == (caption,)


def test_tags_that_are_alike_make_no_new_order():
    assert tag_orders("a, a", 0, seed=0) == ("a, a",)
    assert set(tag_orders("a, a, b", 0, seed=0)) == {"a, a, b", "a, b, a", "b, a, a"}
