import torch
from hypothesis import given
from hypothesis import strategies as st

from pipelines.modeling.seeds import derive_seed, generator_at

places = st.lists(st.one_of(st.integers(0, 1000), st.sampled_from(["shuffle", "augment"])), min_size=1, max_size=3)


@given(st.integers(0, 2**31 - 1), places, places)
def test_derive_seed__other_place__other_seed(seed, one, other):
    assert (derive_seed(seed, *one) == derive_seed(seed, *other)) == (list(map(str, one)) == list(map(str, other)))


@given(st.integers(0, 2**31 - 1), places)
def test_derive_seed__any_place__fits_a_generator(seed, place):
    assert 0 <= derive_seed(seed, *place) < 2**63
    generator_at(seed, *place)


def test_derive_seed__same_place__same_seed_on_every_machine():
    assert derive_seed(7, "shuffle", 3) == 1607239670037233798


def test_generator_at__global_generator_used__draws_the_same():
    before = torch.rand(3, generator=generator_at(7, "augment", 0, 1))
    torch.rand(5)
    assert torch.equal(before, torch.rand(3, generator=generator_at(7, "augment", 0, 1)))
