"""Functions changed in place, also for modules that imported them by name."""

import functools
import inspect
import pickle

import pytest

from mlx_kvq.caches import trampoline


def plain(a, b=2, *, c=3):
    return a, b, c


def every_kind(a, /, b, *rest, c, d=4, **named):
    return a, b, rest, c, d, named


def numbers(n):
    yield from range(n)


@pytest.fixture
def changed():
    """Change a function until the test ends."""
    held = []

    def change(f, make, **options):
        trampoline.replace(f, make, **options)
        held.append(f)

    yield change
    for f in held:
        trampoline.restore(f)


def doubled(original):
    return lambda *args, **kwargs: 2 * (original(*args, **kwargs),)


def test_every_name_and_wrapper_is_led(changed):
    alias, part = plain, functools.partial(plain, 1)
    wrapper = functools.wraps(plain)(lambda *args: plain(*args))
    before = inspect.signature(plain), inspect.getsource(plain), plain.__defaults__
    changed(plain, doubled)
    for call in (plain, alias, wrapper):
        assert call(1) == 2 * ((1, 2, 3),)
    assert part(c=0) == 2 * ((1, 2, 0),)
    assert (inspect.signature(plain), inspect.getsource(plain), plain.__defaults__) == before
    assert pickle.loads(pickle.dumps(plain)) is plain
    trampoline.restore(plain)
    assert plain(1) == (1, 2, 3)


def test_every_kind_of_parameter(changed):
    arguments = ((1, 2, 3), {"c": 5, "e": 6})
    expected = every_kind(*arguments[0], **arguments[1])
    changed(every_kind, doubled)
    assert every_kind(*arguments[0], **arguments[1]) == 2 * (expected,)
    with pytest.raises(TypeError, match=r"every_kind\(\) missing"):
        every_kind(1, 2)


def test_generators_methods_and_closures(changed):
    class Base:
        def method(self):
            return "method"

        @classmethod
        def made(cls):
            return cls.__name__

    class Derived(Base):
        pass

    def enclosed(free):
        return lambda: free

    inner = enclosed("free")
    changed(numbers, lambda original: lambda n: original(n + 1))
    changed(Base.method, doubled)
    changed(trampoline.function(vars(Base)["made"]), doubled)
    changed(inner, doubled)
    assert list(numbers(2)) == [0, 1, 2]
    assert Derived().method() == ("method", "method")
    assert Derived.made() == ("Derived", "Derived")
    assert inner() == ("free", "free")


def test_a_second_time_nothing_happens_unless_the_first_waits(changed):
    changed(plain, doubled, waiting=True)
    changed(plain, lambda original: lambda a, b, *, c: original(a, b, c=c)[0])
    assert plain(7) == 7
    changed(plain, doubled)
    changed(plain, doubled, waiting=True)
    assert plain(7) == 7


def test_what_is_no_function():
    assert trampoline.function(len) is None
    assert trampoline.function(functools.partial(plain)) is None
